"""Manifold distillation against tables of cosines; what leaves it at zero, and what does not."""

import numpy as np
import pytest
import torch
from conftest import Largest

import files
import manifold
import model
from methods import build_method

STUDENT, TEACHER = (8, 16, 24, 32), (16, 24, 40, 48)
NAMES = "patches", "samples", "random"


def output(channels, size=(16, 24), batch=2, seed=0, strides=(1, 2, 4, 8), grad=False):
    """An Output with four maps, `size` divided by these strides, and nothing else."""
    g = torch.Generator().manual_seed(seed)
    maps = []
    for c, stride in zip(channels, strides):
        h, w = (-(-n // stride) for n in size)
        maps.append(torch.randn(batch, c, h, w, generator=g).requires_grad_(grad))
    return model.Output(None, tuple(maps), ())


def only(x):
    """An Output whose map of stage 4 has these tokens (B, N, C) in a row."""
    return model.Output(None, (None, None, None, x.mT[:, :, None]), ())


def build(**options):
    return build_method("manifold", STUDENT, TEACHER, manifold.METHODS, **options)


def terms(s, t, seed=0, **options):
    torch.manual_seed(seed)
    return {k: v.item() for k, v in build(**options)(s, t, None, None).items()}


# ------------------------------------------------------------------------------------------------
# the three terms


def by_loops(s, t, drawn, mutant=None):
    """Unweighted terms of tokens (B, N, C) of student and teacher, in float64."""
    s, t = (x.double().numpy() for x in (s, t))
    B, N = s.shape[:2]

    def difference(p, q):
        (a, b), (c, d) = (s[p], s[q]), (t[p], t[q])
        if mutant != "no norm":
            a, b, c, d = (x / np.sqrt((x * x).sum()) for x in (a, b, c, d))
        return ((a * b).sum() - (c * d).sum()) ** 2

    patches = [difference((b, i), (b, j)) for b, i, j in np.ndindex(B, N, N)]
    samples = [difference((b, i), (c, i)) for i, b, c in np.ndindex(N, B, B)]
    everything = [(k // N, k % N) for k in range(B * N)]
    chosen = everything if mutant == "all rows" else [everything[k] for k in drawn]
    random = [difference(p, q) for p in chosen for q in chosen]
    count = B if mutant == "sums" else len(patches)
    return np.array([sum(patches) / count, np.mean(samples), np.mean(random)])


def test_terms_against_loops():
    """Odd sizes, and a teacher at stride 8 whose map is averaged to the student's grid."""
    s = output(STUDENT, (19, 33), batch=3)
    t = output(TEACHER, (19, 33), batch=3, seed=1, strides=(1, 2, 2, 2))
    assert s.features[3].shape == (3, 32, 3, 5) and t.features[3].shape == (3, 48, 10, 17)
    got = terms(s, t, manifold_rows=11)
    assert tuple(got) == NAMES
    torch.manual_seed(0)
    drawn = torch.randperm(45)[:11].tolist()
    pooled = torch.empty(3, 48, 3, 5)
    for i, j in np.ndindex(3, 5):
        rows = slice(i * 10 // 3, -(-(i + 1) * 10 // 3))
        cols = slice(j * 17 // 5, -(-(j + 1) * 17 // 5))
        pooled[:, :, i, j] = t.features[3][:, :, rows, cols].mean((2, 3))
    tokens = [x.flatten(2).mT for x in (s.features[3], pooled)]
    weights = np.array([4, 0.1, 0.2])
    assert list(got.values()) == pytest.approx(weights * by_loops(*tokens, drawn), rel=1e-5)
    for mutant, at in (("no norm", [0, 1, 2]), ("all rows", [2]), ("sums", [0])):
        wrong = weights * by_loops(*tokens, drawn, mutant)
        assert all(abs(list(got.values())[k] / wrong[k] - 1) > 0.01 for k in at), mutant
    drawn = torch.randperm(45)[:11].tolist()
    assert abs(got["random"] / (weights * by_loops(*tokens, drawn))[2] - 1) > 1e-3


@pytest.mark.parametrize("B, N, cs, ct", [(2, 7, 3, 5), (3, 4, 6, 9), (1, 20, 2, 3)])
def test_cuts_in_float64(B, N, cs, ct):
    """Both forms of the difference: tables for few rows, none for more rows than channels."""
    s, t = (torch.randn(B, N, c, dtype=torch.float64) for c in (cs, ct))
    torch.manual_seed(0)
    unit = (torch.nn.functional.normalize(x, dim=2) for x in (s, t))
    got = [manifold.gram_difference(*pair).mean().item() for pair in manifold.cuts(*unit, 6)]
    torch.manual_seed(0)
    drawn = torch.randperm(B * N)[:6].tolist()
    assert got == pytest.approx(by_loops(s, t, drawn), rel=1e-10, abs=1e-12)


def test_all_rows_are_the_whole_table():
    s, t = torch.randn(2, 6, 16), torch.randn(2, 6, 20)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    got = terms(only(s), only(t), manifold_patch_weight=0.0, manifold_sample_weight=0.0)
    assert torch.get_rng_state().equal(state)  # torch 2.11 cannot compile a draw of all
    whole = by_loops(s, t, range(12))[2]
    assert list(got) == ["random"] and got["random"] == pytest.approx(0.2 * whole, rel=1e-5)
    assert terms(only(s), only(t), seed=1)["random"] == pytest.approx(0.2 * whole, rel=1e-5)


def test_random_rows_follow_the_seed():
    s, t = output(STUDENT), output(TEACHER, seed=1)
    draws = [terms(s, t, seed, manifold_rows=5)["random"] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_192_rows_are_drawn():
    s, t = torch.randn(2, 2, 150, 16)
    rows = [terms(only(s), only(t), manifold_rows=k)["random"] for k in (191, 192, 193)]
    assert rows[0] != terms(only(s), only(t))["random"] == rows[1] != rows[2]


def test_zero_for_the_same_cosines_only():
    s = torch.randn(2, 12, 20, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0][:20]  # (20, 40)
    length = torch.rand(2, 12, 1, dtype=torch.float64) + 0.1
    sign = torch.ones(2, 12, 1, dtype=torch.float64)
    sign[0, ::2] = -1
    shear = torch.randn(20, 40, dtype=torch.float64)
    assert all(abs(v) < 1e-12 for v in terms(only(s), only(length * (s @ rotation))).values())
    for other in (sign * (s @ rotation), s @ shear):
        assert all(v > 1e-4 for v in terms(only(s), only(other)).values())


def test_independent_features_differ_by_the_sum_of_two_variances():
    s, t = torch.randn(4, 256, 192), torch.randn(4, 256, 384)
    got = terms(only(s), only(t))["patches"] / 4
    assert got == pytest.approx((1 / 192 + 1 / 384) * (1 - 1 / 256), rel=0.03)


def test_patches_see_one_image_and_samples_one_position():
    s, t = torch.randn(3, 6, 16), torch.randn(3, 6, 16)
    both = terms(only(s), only(t))
    alone = [terms(only(s[b : b + 1]), only(t[b : b + 1])) for b in range(3)]
    assert both["patches"] == pytest.approx(np.mean([a["patches"] for a in alone]), rel=1e-5)
    assert all(a["samples"] < 1e-12 for a in alone) and both["samples"] > 1e-4
    order = torch.randperm(6)
    moved = terms(only(s[:, order]), only(t[:, order]))  # in all images alike
    assert moved["samples"] == pytest.approx(both["samples"], rel=1e-5)
    rolled = [torch.stack([x[b].roll(b, 0) for b in range(3)]) for x in (s, t)]
    rolled = terms(only(rolled[0]), only(rolled[1]))  # in each image by another distance
    assert rolled["patches"] == pytest.approx(both["patches"], rel=1e-5)
    assert abs(rolled["samples"] / both["samples"] - 1) > 0.01


# ------------------------------------------------------------------------------------------------
# as a method


def test_stages_are_averaged():
    s, t = output(STUDENT), output(TEACHER, seed=1)
    few = dict(manifold_rows=10**6)  # all: nothing is drawn
    three, four = (terms(s, t, manifold_stages=(i,), **few) for i in (3, 4))
    both = terms(s, t, manifold_stages=(3, 4), **few)
    assert three != four == terms(s, t, **few)
    assert all(both[k] == pytest.approx((three[k] + four[k]) / 2, rel=1e-4) for k in NAMES)


def test_no_table_of_all_positions_is_built():
    """Stage 1 of 512 and 1024 pixels a side, forward and backward."""
    largest = []
    for side in (128, 256):
        with torch.device("meta"):
            maps = torch.randn(2, 8, side, side, requires_grad=True), torch.randn(2, 16, side, side)
            pair = (model.Output(None, (x,), ()) for x in maps)
            with Largest() as mode:
                sum(build(manifold_stages=(1,))(*pair, None, None).values()).backward()
        largest.append(mode.numel)
    assert largest == [2 * 16 * 128**2, 2 * 16 * 256**2]  # the teacher's map


def test_gradients_reach_the_encoder_only():
    torch.manual_seed(0)
    student, teacher = model.build("nano", 4), model.build("b0", 4)
    method = build(manifold_stages=(3, 4))
    assert not list(method.parameters()) and not method.needs_head
    images = torch.randn(2, 3, 128, 160)
    with torch.no_grad():
        seen = teacher(images, head=False)
    sum(method(student(images), seen, images, None).values()).backward()
    for key, p in student.named_parameters():
        assert (p.grad is None) == key.startswith("head"), key
        assert p.grad is None or (p.grad.isfinite().all() and p.grad.any()), key
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (9, 11), (24, 40)])
@pytest.mark.parametrize("strides", [(1, 2, 4, 8), (1, 2, 2, 2), (1, 2, 4, 16)])
def test_any_size_and_any_stride_of_the_teacher(batch, size, strides):
    s = output(STUDENT, size, batch, grad=True)
    t = output((256, 512, 1024, 2048), size, batch, 1, strides)
    got = build(manifold_stages=(1, 2, 3, 4))(s, t, None, None)
    assert tuple(got) == NAMES and all(v.shape == () and v.isfinite() for v in got.values())
    sum(got.values()).backward()
    assert all(x.grad.isfinite().all() for x in s.features)


@pytest.mark.parametrize("stage", [1, 4])
def test_terms_are_those_of_float32_under_autocast(stage):
    s, t = (output(c, seed=c[0]) for c in (STUDENT, TEACHER))
    s, t = (o._replace(features=[x.bfloat16() for x in o.features]) for o in (s, t))
    full = [o._replace(features=[x.float() for x in o.features]) for o in (s, t)]
    torch.manual_seed(0)
    want = build(manifold_stages=(stage,))(*full, None, None)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        got = build(manifold_stages=(stage,))(s, t, None, None)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in got.values())
    assert got == want


def test_a_stage_named_twice():
    with pytest.raises(files.UserError, match="names one stage twice"):
        build(manifold_stages=(4, 4))


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_stage_is_compared_with_the_teachers_own(stage):
    """Where all other stages are missing, the terms are the same."""

    def only(out):
        features = (f if i == stage - 1 else None for i, f in enumerate(out.features))
        return model.Output(None, tuple(features), ())

    s, t = output(STUDENT), output(TEACHER, seed=1)
    how = dict(manifold_stages=(stage,), manifold_rows=10**6)
    assert terms(s, t, **how) == terms(only(s), only(t), **how)
