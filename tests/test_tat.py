"""TaT against loops over positions, its two softmax axes, what it builds and what it drops."""

import copy

import numpy as np
import pytest
import torch
from conftest import Largest
from torch import nn

import model
import tat
from methods import build_method

STUDENT, TEACHER, WIDTHS = (8, 16, 24, 32), (16, 24, 40, 48), (6, 10)


def decoded(*shape, seed=0, grad=False):
    """An Output with a decoded map of this shape (B, C, H, W) and nothing else."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return model.Output(None, (), (), x.requires_grad_(grad))


def build(widths=WIDTHS, **options):
    """A method whose norms, 1 and 0 at first, have learnt something."""
    torch.manual_seed(0)
    method = build_method("tat", STUDENT, TEACHER, tat.METHODS, widths, **options)
    for layer in (method.query, method.key, method.value):
        nn.init.normal_(layer[1].weight, 1, 0.2), nn.init.normal_(layer[1].bias, 0, 0.5)
    return method


# ------------------------------------------------------------------------------------------------
# the loss, position by position


def pooled(x, size):
    """Adaptive average pooling of (B, C, H, W), cell by cell."""
    out = np.empty((*x.shape[:2], *size))
    for i, j in np.ndindex(*size):
        (y0, y1), (x0, x1) = (
            (k * n // m, -(-(k + 1) * n // m)) for k, n, m in zip((i, j), x.shape[2:], size)
        )
        out[:, :, i, j] = x[:, :, y0:y1, x0:x1].mean((2, 3))
    return out


def embedded(layer, x, mutant):
    conv, norm = layer
    w, gain, bias = (p.detach().double().numpy() for p in (conv.weight, norm.weight, norm.bias))
    y = np.einsum("bchw,oc->bohw", x, w[:, :, 0, 0])
    axes = (0, 2, 3) if mutant == "statistics of the batch" else (2, 3)
    mean, var = y.mean(axes, keepdims=True), y.var(axes, keepdims=True)
    return (y - mean) / np.sqrt(var + 1e-5) * gain[:, None, None] + bias[:, None, None]


def squared_errors(q, k, v, t, axis, mutant):
    """Of lists of vectors, one a position."""
    scale = len(q[0]) ** -0.5 if mutant == "1/sqrt(D)" else 1
    errors = []
    for i in range(len(q)):
        if axis == "teacher":
            likeness = [scale * (q[i] @ k[j]) for j in range(len(q))]
        else:
            likeness = [scale * (q[j] @ k[i]) for j in range(len(q))]
        share = np.exp(np.array(likeness) - max(likeness))
        rebuilt = sum(a * x for a, x in zip(share / share.sum(), v))
        errors.append((rebuilt - (k[i] if mutant == "target k" else t[i])) ** 2)
    return errors


def by_loops(method, s, t, patch, group, windows, axis="teacher", mutant=None):
    """(patch-group term, anchor term) of decoded maps (B, C, H, W), unweighted.

    patch: its height and width; windows: those of the anchors.
    """
    size = [(n + 1) // 2 for n in s.shape[2:]]
    s, t = (pooled(x.double().numpy(), size) for x in (s, t))
    layers = (method.query, s), (method.key, t), (method.value, s)
    maps = [*(embedded(layer, x, mutant) for layer, x in layers), t]
    cells = [(i, j) for i in range(size[0] // patch[0]) for j in range(size[1] // patch[1])]
    if mutant == "column-major":
        cells.sort(key=lambda cell: cell[::-1])
    groups = [cells[k : k + group] for k in range(0, len(cells), group)]
    patches, anchors = [], []
    for b in range(len(s)):
        for chosen in groups:
            sides = []
            for x in maps:
                rows = []
                for y, z in np.ndindex(*patch):
                    places = [(i * patch[0] + y, j * patch[1] + z) for i, j in chosen]
                    rows.append(np.concatenate([x[b, :, p, q] for p, q in places]))
                sides.append(rows)
            patches += squared_errors(*sides, axis, mutant)
        sides = []
        for x in maps:
            (h, w), counts = windows, (size[0] // windows[0], size[1] // windows[1])
            cut = [
                (slice(i * h, i * h + h), slice(j * w, j * w + w)) for i, j in np.ndindex(counts)
            ]
            sides.append([x[b][:, rows, cols].mean((1, 2)) for rows, cols in cut])
        anchors += squared_errors(*sides, axis, mutant)
    return np.concatenate(patches).mean(), np.concatenate(anchors).mean()


MUTANTS = "1/sqrt(D)", "column-major", "statistics of the batch", "target k"


@pytest.mark.parametrize("axis", ["teacher", "student"])
def test_terms_against_loops(axis):
    """Odd sizes, a teacher at stride 8, dropped rows and columns, a smaller last group."""
    s, t = decoded(2, 6, 37, 42), decoded(2, 10, 19, 21, seed=1)
    options = dict(tat_patch=4, tat_group=3, tat_anchors=8)
    method = build(tat_axis=axis, tat_patch_weight=2.0, tat_anchor_weight=3.0, **options)
    terms = method(s, t, None, None)
    got = terms["patches"].item() / 2, terms["anchors"].item() / 3
    geometry = s.decoded, t.decoded, (4, 4), 3, (2, 3)  # of 19x21, rows and columns are left
    assert got == pytest.approx(by_loops(method, *geometry, axis), rel=1e-5)
    for mutant in MUTANTS:
        wrong = by_loops(method, *geometry, axis, mutant)
        assert abs(got[0] / wrong[0] - 1) > 1e-3, mutant
        assert mutant == "column-major" or abs(got[1] / wrong[1] - 1) > 1e-3, mutant
    other = by_loops(method, *geometry, "student" if axis == "teacher" else "teacher")
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(got, other))


def test_mismatch_in_float64():
    q, k, v, t = torch.randn(4, 1, 5, 7, dtype=torch.float64)
    for axis in ("teacher", "student"):
        got = build(tat_axis=axis).mismatch([q], [k], [v], [t])
        rows = [list(x[0].numpy()) for x in (q, k, v, t)]
        assert got.item() == pytest.approx(np.mean(squared_errors(*rows, axis, None)), rel=1e-12)


def test_instance_norm_is_a_batch_norm_that_sees_one_image():
    layer = build().query
    conv, norm = layer
    batch_norm = nn.BatchNorm2d(len(norm.weight), eps=norm.eps)
    batch_norm.load_state_dict(norm.state_dict(), strict=False)
    x = torch.randn(3, 6, 8, 9)
    alone = torch.cat([batch_norm(conv(image[None])) for image in x])
    assert torch.allclose(layer(x), alone, atol=1e-5)
    assert torch.equal(layer(x), copy.deepcopy(layer).eval()(x))
    assert not torch.allclose(layer(x), batch_norm(conv(x)), atol=1e-2)


def plain(axis, scale):
    """TaT without embeddings: q, k, v and t are the maps themselves, of rows this long."""
    method = build(widths=(32, 32), tat_axis=axis, tat_patch=64, tat_patch_weight=1.0)
    method.query = method.key = method.value = nn.Identity()
    g = torch.Generator().manual_seed(0)
    return method, scale * nn.functional.normalize(torch.randn(1, 32, 8, 8, generator=g), dim=1)


def test_only_the_axis_of_the_text_matches_a_permuted_student():
    for axis, low, high in (("student", 0, 1e-6), ("teacher", 1.0, 3.0)):
        method, t = plain(axis, scale=30.0)
        s = t.flatten(2)[..., torch.randperm(64)].view_as(t)
        loss = method.mismatch(*(tat.patch_groups(x, 64, 1) for x in (s, t, s, t)))
        assert low <= loss.item() / t.var().item() <= high


def test_equal_maps_cost_nothing_only_if_positions_are_told_apart():
    for scale, low, high in ((1.0, 0.8, 1.0), (10.0, 0, 1e-6)):
        method, t = plain("teacher", scale)
        loss = method.mismatch(*(tat.patch_groups(x, 64, 1) for x in (t, t, t, t)))
        assert low <= loss.item() / t.var().item() <= high


def test_weights_are_those_released_for_their_doubly_averaged_cross_entropy():
    """B * (CE / B + alpha * sum_i (L_P,i + gamma * L_A,i) / B) of 16 images, taken one by one."""
    B, alpha, gamma, ce = 16, 0.1, 0.4, 2.5
    method, ones = build(), build(tat_patch_weight=1.0, tat_anchor_weight=1.0)
    s, t = decoded(B, 6, 32, 32), decoded(B, 10, 32, 32, seed=1)
    each = [
        ones(*(model.Output(None, (), (), o.decoded[i : i + 1]) for o in (s, t)), None, None)
        for i in range(B)
    ]
    released = ce / B + alpha * sum(e["patches"] + gamma * e["anchors"] for e in each) / B
    ours = ce + sum(method(s, t, None, None).values())
    assert ours.item() == pytest.approx(B * released.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------
# geometry


@pytest.mark.parametrize(
    "patch, group, anchors, groups, positions, points",
    [(8, 4, 32, 64, 64, 32), (4, 1, 64, 1024, 16, 64), (4, 2, 32, 512, 16, 32)],
)
def test_published_geometries(patch, group, anchors, groups, positions, points):
    """VOC with ResNet-18 and MobileNetV2, COCO-Stuff with ResNet-18, of maps of 129x129."""
    x = torch.empty(1, 3, 129, 129)
    assert [g.shape for g in tat.patch_groups(x, patch, group)] == [(groups, positions, 3 * group)]
    assert [a.shape for a in tat.anchor_points(x, anchors)] == [(1, points**2, 3)]


@pytest.mark.parametrize("size", [(24, 40), (4, 4), (1, 9), (7, 15), (16, 17), (63, 61), (64, 64)])
def test_any_map_is_covered_but_for_a_few_rows(size):
    H, W = size
    x = torch.arange(2 * H * W).view(2, 1, H, W) + 1.0
    seen = torch.cat([g.flatten() for g in tat.patch_groups(x, 8, 4)])
    assert len(seen.unique()) == len(seen) <= x.numel()  # none twice
    n, m = max(1, H // 8), max(1, W // 8)
    assert len(seen) == 2 * (H - H % n) * (W - W % m) > 0.8 * x.numel()
    (points,) = tat.anchor_points(x, 32)
    assert min(H, 22) * min(W, 22) <= points.shape[1] <= min(H, 47) * min(W, 47)


def test_left_over_rows_and_columns_are_dropped():
    q, k, v, t = torch.randn(4, 1, 5, 17, 17).unbind()
    q.requires_grad_(), v.requires_grad_()
    method = build(tat_patch=4)

    def loss(t):
        return method.mismatch(*(tat.patch_groups(x, 4, 4) for x in (q, k, v, t)))

    loss(t).backward()
    for grad in (q.grad, v.grad):
        assert not grad[..., 16, :].any() and not grad[..., 16].any()
        assert grad[..., :16, :16].abs().amin(1).min() > 0
    edited = t.clone()
    edited[..., 16, :], edited[..., 16] = 9, 9
    assert loss(edited) == loss(t)
    edited[..., 15, 15] = 9
    assert loss(edited) != loss(t)


def test_one_patch_and_as_many_anchors_as_positions_are_the_full_form():
    maps = torch.randn(4, 2, 5, 6, 7, dtype=torch.float64).unbind()
    tokens = [[model.to_tokens(x)] for x in maps]
    method = build()
    full = method.mismatch(*tokens).item()
    patch = method.mismatch(*(tat.patch_groups(x, 10**6, 1) for x in maps)).item()
    anchors = method.mismatch(*(tat.anchor_points(x, 10**6) for x in maps)).item()
    assert full == pytest.approx(patch, rel=1e-12) == pytest.approx(anchors, rel=1e-12)
    assert method.mismatch(*(tat.patch_groups(x, 3, 1) for x in maps)).item() != full


@pytest.mark.parametrize("widths", [(2, 3), (256, 768)])
def test_what_is_built_grows_with_the_map_and_not_with_its_square(widths):
    """From 256 to 512 to 1024 positions of the decoded map a side, forward and backward."""

    def largest(side, **options):
        with torch.device("meta"):
            s = model.Output(None, (), (), torch.randn(2, widths[0], side, side).requires_grad_())
            t = model.Output(None, (), (), torch.randn(2, widths[1], side, side))
            method = tat.TaT(None, None, widths, **options)
        with Largest() as mode:
            sum(method(s, t, None, None).values()).backward()
        return mode.numel

    sizes = 256, 512, 1024
    linear = [largest(n, tat_anchors=8) for n in sizes]
    assert [b / a for a, b in zip(linear, linear[1:])] == [4, 4]
    full = [largest(n, tat_patch=n, tat_group=1) for n in sizes]
    assert full == [2 * (n // 2) ** 4 for n in sizes]  # B * (H * W)^2
    default = [largest(n) for n in sizes]
    assert default[2] <= 4 * default[1] <= 16 * default[0] and default[2] < full[2] / 50


# ------------------------------------------------------------------------------------------------
# as a method


def test_parameters_added_for_b2_to_b0():
    with torch.device("meta"):
        s, t = model.build("b0", 19), model.build("b2", 19)
        widths = (s.width, t.width)
        method = build_method("tat", s.channels, t.channels, tat.METHODS, widths)
    assert model.count_parameters(method) == 2 * 256 * 768 + 768 * 768 + 6 * 768 == 987_648


@pytest.mark.parametrize("axis", ["teacher", "student"])
def test_gradients_reach_student_and_embeddings_only(axis):
    torch.manual_seed(0)
    student, teacher = model.build("nano", 4), model.build("b0", 4)
    method = build((student.width, teacher.width), tat_axis=axis)
    images = torch.randn(2, 3, 128, 160)
    with torch.no_grad():
        seen = teacher(images)
    sum(method(student(images), seen, images, None).values()).backward()
    # one norm's bias adds the same to all that its softmax compares
    idle = "key.1.bias" if axis == "teacher" else "query.1.bias"
    for key, p in method.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
        assert (p.grad.abs().max() > 1e-5) == (key != idle), key
    for key, p in student.named_parameters():
        assert (p.grad is None) == key.startswith("head.classifier"), key
        assert p.grad is None or p.grad.isfinite().all(), key
    assert all(p.grad is None for p in teacher.parameters())
    both = decoded(1, 6, 8, 8, grad=True), decoded(1, 10, 8, 8, grad=True)
    sum(build()(*both, None, None).values()).backward()
    assert both[0].decoded.grad.any()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (9, 11), (24, 40), (48, 80)])
@pytest.mark.parametrize("stride", [4, 8, 16])
def test_any_size_and_any_stride_of_the_teacher(batch, size, stride):
    small = [-(-4 * n // stride) for n in size]
    terms = build()(decoded(batch, 6, *size), decoded(batch, 10, *small), None, None)
    assert set(terms) == {"patches", "anchors"}
    assert all(v.shape == () and v.isfinite() and v > 0 for v in terms.values())


def test_terms_are_those_of_float32_under_autocast():
    s, t = (decoded(2, c, 32, 40) for c in WIDTHS)
    s, t = (o._replace(decoded=o.decoded.bfloat16()) for o in (s, t))
    method = build()
    want = method(*(o._replace(decoded=o.decoded.float()) for o in (s, t)), None, None)
    with torch.autocast("cpu", torch.bfloat16):
        got = method(s, t, None, None)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in got.values())
    assert got == want


def test_each_term_alone():
    s, t = decoded(2, 6, 32, 40), decoded(2, 10, 32, 40)
    both = build()(s, t, None, None)
    patches = build(tat_anchor_weight=0.0)(s, t, None, None)
    anchors = build(tat_patch_weight=0.0)(s, t, None, None)
    assert {**patches, **anchors} == both and len(patches) == len(anchors) == 1


def test_whole_tat_convolves_three_by_three():
    whole = tat.WholeTaT((3, 5), (4, 6))
    assert [p.shape for p in (whole.query[0].weight, whole.value[0].weight)] == [(6, 5, 3, 3)] * 2
