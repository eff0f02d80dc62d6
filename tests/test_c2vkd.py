"""C2VKD against loops and the n x n matrices it avoids, and what each reading of it can see."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Largest

import c2vkd
import methods
import model
from c2vkd import C2VKD, AttentionPool, graph, kl, pdd
from distill import IGNORE, NoDistillation
from files import UserError
from methods import build_method
from step import Learner

STUDENT, TEACHER = (8, 12, 16, 24), (16, 24, 40, 128)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def output(channels, strides, size=(64, 96), batch=2, seed=0, classes=5, grad=False):
    """An Output for images of `size`: strides of the four maps; logits at that of the first map,
    or, of a CNN, of the last."""
    g = torch.Generator().manual_seed(seed)
    grids = [tuple(-(-n // s) for n in size) for s in strides]
    maps = [torch.randn(batch, c, *s, generator=g) for c, s in zip(channels, grids)]
    logits = 2 * torch.randn(batch, classes, *grids[3 if strides[3] == 8 else 0], generator=g)
    tensors = [t.requires_grad_(grad) for t in (logits, *maps)]
    return model.Output(tensors[0], tuple(tensors[1:]), ())


def pair(size=(64, 96), batch=2, cnn=True, **kw):
    student = output(STUDENT, (4, 8, 16, 32), size, batch, grad=True, **kw)
    return student, output(TEACHER, (4, 8, 8, 8) if cnn else (4, 8, 16, 32), size, batch, 1, **kw)


def some_labels(size=(64, 96), batch=2, classes=5):
    labels = torch.randint(0, classes, (batch, *size), dtype=torch.uint8)
    labels[:, :2] = IGNORE
    return labels


# ------------------------------------------------------------------------------------------------
# PDD


def pdd_by_loops(s, t, labels, reading, a, b, mutant=None):
    """Pixel by pixel, class by class, from logits at the labels' size. Mutants for control."""
    total, count = 0.0, 0
    for i in range(s.shape[0]):
        for y in range(s.shape[2]):
            for x in range(s.shape[3]):
                k = int(labels[i, y, x])
                if k == IGNORE:
                    continue
                p, q = ([math.exp(v) for v in z[i, :, y, x].tolist()] for z in (s, t))
                p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
                sy, ty, count = p[k], q[k], count + 1
                if reading == "binary":
                    qy, qn = (ty + 1) / 2, (1 - ty) / 2
                    if mutant == "no label":
                        qy, qn = ty, 1 - ty
                    if mutant == "forward":
                        part = qy * math.log(qy / sy), qn * math.log(qn / (1 - sy))
                    else:
                        part = sy * math.log(sy / qy), (1 - sy) * math.log((1 - sy) / qn)
                    total += a * part[0] + b * part[1]
                else:
                    total += a * ty * math.log(ty / sy)
                    total += a * (1 - ty) * math.log((1 - ty) / (1 - sy))
                    for j in range(len(p)):
                        if j != k:
                            share = q[j] / (1 - ty)
                            ratio = share / (p[j] / (1 - sy))
                            weight = 1 - ty if mutant == "coupled" else 1
                            total += b * weight * share * math.log(ratio)
    return total / (s.shape[0] * s.shape[2] * s.shape[3] if mutant == "all pixels" else count)


@pytest.mark.parametrize("reading", ["binary", "dkd"])
def test_pdd_against_loops(reading):
    s, t = 2 * torch.randn(2, 2, 4, 6, 5)
    labels = some_labels((6, 5), classes=4)
    for a, b in ((0.5, 0.5), (0.25, 2.0)):
        want = pdd_by_loops(s, t, labels, reading, a, b)
        assert pdd(s, t, labels, reading, a, b).item() == pytest.approx(want, rel=1e-5)
    mutants = ["no label", "forward"] if reading == "binary" else ["coupled"]
    for mutant in [*mutants, "all pixels"]:
        assert abs(pdd_by_loops(s, t, labels, reading, a, b, mutant) / want - 1) > 0.01, mutant
    small = F.interpolate(t, (3, 4), mode="bilinear")  # a CNN's logits
    want = F.interpolate(small, (6, 5), mode="bilinear")
    got = pdd(s, small, labels, reading).item()
    assert got == pytest.approx(pdd(s, want, labels, reading).item(), rel=1e-5)


def gradient(s, t, labels, reading):
    s = s.detach().requires_grad_()
    return torch.autograd.grad(pdd(s, t, labels, reading), s)[0]


def test_binary_reading_is_smallest_halfway_to_the_label():
    """At s_y = (1 + t_y) / 2, and not at the teacher, where it is not 0 either."""
    t, labels = torch.tensor([0.8, 0.2]).log().view(1, 2, 1, 1), torch.zeros(1, 1, 1)

    def of(p):
        s = torch.tensor([p, 1 - p]).log().view(1, 2, 1, 1)
        return pdd(s, t, labels).item(), gradient(s, t, labels, "binary")[0, 0, 0, 0].item()

    assert of(0.9)[0] == pytest.approx(0, abs=1e-6) and of(0.9)[1] == pytest.approx(0, abs=1e-6)
    assert of(0.8)[1] < -0.01 and of(0.95)[1] > 0.01
    assert of(0.8)[0] > 0.01
    assert pdd(t, t, labels, "dkd").item() == pytest.approx(0, abs=1e-6)


def test_binary_reading_hardly_moves_what_is_surely_wrong():
    """Its gradient on the label's logit at s_y = 1e-4, .05, .5, and that of the other's first part,
    with a teacher of t_y = .9."""
    t = torch.tensor([0.9, 0.06, 0.04]).log().view(1, 3, 1, 1)
    labels = torch.zeros(1, 1, 1)
    for p, binary, among_two in ((1e-4, 0.0006, 0.450), (0.05, 0.140, 0.425), (0.5, 0.368, 0.200)):
        s = torch.tensor([p, 0.6 * (1 - p), 0.4 * (1 - p)]).log().view(1, 3, 1, 1)
        for reading, want in (("binary", binary), ("dkd", among_two)):
            got = -gradient(s, t, labels, reading)[0, 0, 0, 0].item()
            assert got == pytest.approx(want, abs=6e-4), (p, reading)


def test_only_dkd_sees_which_wrong_class_the_teacher_prefers():
    s, t = 2 * torch.randn(2, 1, 5, 4, 4)
    labels = torch.zeros(1, 4, 4)
    other = t[:, [0, 2, 3, 4, 1]]
    change = {
        r: (gradient(s, t, labels, r) - gradient(s, other, labels, r)).norm()
        / gradient(s, t, labels, r).norm()
        for r in ("binary", "dkd")
    }
    assert change["binary"] < 1e-5 and change["dkd"] > 0.1


@pytest.mark.parametrize("reading", ["binary", "dkd"])
def test_ignored_pixels_change_nothing(reading):
    s, t = torch.randn(2, 2, 5, 8, 8)
    labels = some_labels((8, 8))
    changed = s.clone()
    changed[:, :, :2] += 3 * torch.randn(2, 5, 2, 8)
    louder = t.clone()
    louder[:, :, :2] *= 5
    assert torch.equal(pdd(s, t, labels, reading), pdd(changed, louder, labels, reading))
    g = gradient(s, t, labels, reading)
    assert torch.equal(g[:, :, 2:], gradient(changed, louder, labels, reading)[:, :, 2:])
    assert not g[:, :, :2].any() and g[:, :, 2:].any()
    void = torch.full_like(labels, IGNORE)
    assert pdd(s, t, void, reading).item() == 0
    assert not gradient(s, t, void, reading).any()


@pytest.mark.parametrize("reading", ["binary", "dkd"])
def test_a_map_is_its_valid_pixels(reading):
    s, t = torch.randn(2, 2, 5, 8, 8)
    labels = some_labels((8, 8))
    valid = labels != IGNORE
    rows = [z.movedim(1, 3)[valid].T[None, :, :, None] for z in (s, t)]  # (1, K, n, 1)
    flat = pdd(*rows, labels[valid].view(1, -1, 1), reading)
    assert pdd(s, t, labels, reading).item() == pytest.approx(flat.item(), rel=1e-6)


@pytest.mark.parametrize("reading", ["binary", "dkd"])
def test_pdd_of_very_sure_nets_is_finite(reading):
    s, t = torch.zeros(2, 1, 3, 2, 2)
    s[:, 0], t[:, 1] = 200, 200
    for labels in (torch.zeros(1, 2, 2), torch.ones(1, 2, 2)):
        for a, b in ((s, t), (t, s), (s, s)):
            assert pdd(a, b, labels, reading).isfinite()
            assert gradient(a, b, labels, reading).isfinite().all()
    assert pdd(s[:, :1], t[:, :1], torch.zeros(1, 2, 2), reading).isfinite()  # a single class


# ------------------------------------------------------------------------------------------------
# VLFD


def test_global_is_a_mean_over_all_elements():
    s, t = torch.randn(2, 2, 6, 3, 4, dtype=torch.float64)
    t = 3 * t
    total = 0.0
    for b in range(2):
        for y in range(3):
            for x in range(4):
                p, q = (z[b, :, y, x].exp() / z[b, :, y, x].exp().sum() for z in (t, s))
                total += (p * (p / q).log()).sum().item()
    assert kl(s, t).item() == pytest.approx(total / (2 * 3 * 4 * 6), rel=1e-5)
    assert kl(s, t).item() != pytest.approx(total / (2 * 3 * 4), rel=0.1)  # a mean over positions
    assert kl(s, t).item() != pytest.approx(kl(t, s).item(), rel=0.01)  # the paper's direction
    assert kl(t, t).item() == 0
    vector = kl(s[:, :, :1, :1].flatten(1), t[:, :, :1, :1].flatten(1))
    assert vector.item() == pytest.approx(kl(s[:, :, :1, :1], t[:, :, :1, :1]).item())


def graph_with_matrices(student, teacher, mutant=None):
    """As it is published: all pairs of positions, of all images, in (B*H*W)^2 matrices."""
    matrices = []
    for x in (student, teacher):
        r = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        if mutant != "lengths":
            r = r / r.norm(dim=1, keepdim=True)
        if mutant != "centres":
            r = r - r.mean(dim=1, keepdim=True)
        matrices.append(torch.einsum("ic,jc->ij", r, r) / (r.shape[1] - (mutant != "C")))
    return (matrices[0] - matrices[1]).square().mean()


@pytest.mark.parametrize("C, size", [(12, (5, 7)), (48, (2, 3)), (256, (12, 16))])
def test_graph_against_the_matrices(C, size):
    g = torch.Generator().manual_seed(C)
    s, t = torch.randn(2, 2, C, *size, generator=g, dtype=torch.float64) + 0.3
    s.requires_grad_()
    want, got = graph_with_matrices(s, t), graph(s, t)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    a, b = (torch.autograd.grad(x, s)[0] for x in (want, got))
    assert (a - b).norm() < 1e-5 * a.norm()
    for mutant in ("lengths", "centres", "C"):
        other = graph_with_matrices(s, t, mutant).item()
        assert other != pytest.approx(want.item(), rel=2e-3), mutant
    assert abs(graph(t, t).item()) < 1e-5 * want.item()


def test_graph_does_not_see_lengths_and_has_a_bound():
    s, t = torch.randn(2, 2, 64, 6, 6)
    scaled = s * (0.1 + 9 * torch.rand(2, 1, 6, 6))
    assert graph(scaled, t).item() == pytest.approx(graph(s, t).item(), rel=1e-4)
    assert graph(s + torch.rand(2, 1, 6, 6), t).item() != pytest.approx(
        graph(s, t).item(), rel=1e-3
    )
    bound = (2 / 63) ** 2
    e = torch.zeros(64).index_fill(0, torch.arange(32), 1.0).view(1, 64, 1, 1)
    for x in (s, 100 * s, e.expand(2, 64, 6, 6), s.abs()):
        assert 0 < graph(x, t).item() <= bound


def test_graph_compares_across_images():
    s, t = torch.randn(2, 2, 16, 4, 4)
    apart = (graph(s[:1], t[:1]) + graph(s[1:], t[1:])).item() / 2
    assert graph(s, t).item() != pytest.approx(apart, rel=0.01)


def test_graph_makes_no_matrix_of_all_pairs():
    s, t = torch.randn(2, 2, 16, 24, 24, requires_grad=True)  # 1152 positions
    with Largest() as seen:
        torch.autograd.grad(graph(s, t), s)
    assert seen.numel <= s.numel()
    with Largest() as seen:
        graph_with_matrices(s, t)
    assert seen.numel == 1152**2


# ------------------------------------------------------------------------------------------------
# the attention pool


def clip_file(path, C=128, D=32, side=7, prefix="visual.attnpool.", **changes):
    g = torch.Generator().manual_seed(5)
    state = {"positional_embedding": torch.randn(side**2 + 1, C, generator=g)}
    for name, rows in (("q", C), ("k", C), ("v", C), ("c", D)):
        state[f"{name}_proj.weight"] = torch.randn(rows, C, generator=g) / C**0.5
        state[f"{name}_proj.bias"] = torch.randn(rows, generator=g)
    state = {prefix + k: v.half() for k, v in (state | changes).items()}
    torch.save(state | {"positional_embedding": torch.randn(77, 64)}, path)  # the text's
    return {k.removeprefix(prefix): v.float() for k, v in state.items()}


def pool_by_torch(state, x):
    """CLIP's: torch's own attention of the mean of all positions to itself and to them."""
    B, C, H, W = x.shape
    grid = state["positional_embedding"][1:].view(7, 7, C).permute(2, 0, 1)[None]
    if (H, W) != (7, 7):
        grid = F.interpolate(grid, (H, W), mode="bilinear")
    positions = torch.cat([state["positional_embedding"][:1], grid[0].flatten(1).T])
    x = x.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(0, keepdim=True), x]) + positions[:, None]
    biases = torch.cat([state[f"{k}_proj.bias"] for k in "qkv"])
    y, _ = F.multi_head_attention_forward(
        x[:1], x, x, C, C // 64, None, biases, None, None, False, 0.0,
        state["c_proj.weight"], state["c_proj.bias"], training=False, need_weights=False,
        use_separate_proj_weight=True,
        **{f"{k}_proj_weight": state[f"{k}_proj.weight"] for k in "qkv"},
    )  # fmt: skip
    return y[0]


@pytest.mark.parametrize("size", [(7, 7), (4, 6), (9, 8)])
def test_attention_pool_is_clips(tmp_path, size):
    state = clip_file(tmp_path / "clip.pth")
    pool, x = AttentionPool(tmp_path / "clip.pth", 128), torch.randn(2, 128, *size)
    assert pool(x).shape == (2, 32)
    assert torch.allclose(pool(x), pool_by_torch(state, x), atol=1e-5)
    assert not torch.allclose(pool(x), pool(x.flip(2)), atol=1e-3)  # it knows positions
    assert not list(pool.parameters()) and not pool.state_dict()


def test_attention_pools_that_do_not_fit(tmp_path):
    path = tmp_path / "clip.pth"
    with pytest.raises(UserError, match="--c2vkd-clip .*clip.pth: no such file"):
        AttentionPool(path, 128)
    for channels, changes, word in (
        (64, {}, "positional_embedding"),
        (128, {"k_proj.weight": torch.zeros(128, 64)}, "k_proj.weight"),
        (128, {"positional_embedding": torch.zeros(49, 128)}, "positional_embedding"),
        (128, {"c_proj.bias": torch.zeros(31)}, "c_proj.bias"),
        (128, {"prefix": "pool."}, "positional_embedding"),
    ):
        clip_file(path, **changes)
        with pytest.raises(UserError, match=f"visual.attnpool.{word} is missing or does not") as e:
            AttentionPool(path, channels)
        assert "\n" not in str(e.value)
    path.write_text("hello")
    with pytest.raises(UserError, match="not a checkpoint of tensors"):
        AttentionPool(path, 128)


# ------------------------------------------------------------------------------------------------
# the method


def test_its_terms(tmp_path):
    """With a CNN's maps and logits: on the stride-16 grid, by its four equations."""
    state = clip_file(tmp_path / "clip.pth")
    method = C2VKD(STUDENT, TEACHER, c2vkd_clip=tmp_path / "clip.pth")
    (s, t), labels = pair(), some_labels()
    got = method(s, t, None, labels)
    deep = torch.einsum("bchw,oc->bohw", s.features[3], method.project.weight[:, :, 0, 0])
    deep = F.interpolate(deep, (4, 6), mode="bilinear")
    target = t.features[3].view(2, 128, 4, 2, 6, 2).mean((3, 5))  # what bilinear is at a half
    said = s.features[3].mean((2, 3)) @ method.describe.weight.T + method.describe.bias
    want = dict(
        pdd=pdd(s.logits, t.logits, labels),
        graph=0.1 * graph_with_matrices(deep, target),
        language=0.5 * kl(said, pool_by_torch(state, target)),
    )
    want["global"] = 0.1 * kl(deep, target)
    assert got.keys() == want.keys()
    for k, v in want.items():
        assert got[k].item() == pytest.approx(v.item(), rel=1e-4) and v > 0, k


def test_weights_and_readings():
    (s, t), labels = pair(), some_labels()
    torch.manual_seed(0)
    one = C2VKD(STUDENT, TEACHER)(s, t, None, labels)
    torch.manual_seed(0)
    more = dict(c2vkd_global=1.0, c2vkd_graph=20.0, c2vkd_alpha=0.25, c2vkd_beta=2.0)
    two = C2VKD(STUDENT, TEACHER, c2vkd_pdd="dkd", **more)(s, t, None, labels)
    assert set(one) == {"pdd", "global", "graph"}
    assert two["global"].item() == pytest.approx(10 * one["global"].item(), rel=1e-5)
    assert two["graph"].item() == pytest.approx(200 * one["graph"].item(), rel=1e-5)
    assert two["pdd"].item() == pytest.approx(
        pdd(s.logits, t.logits, labels, "dkd", 0.25, 2.0).item()
    )
    with pytest.raises(UserError, match="--c2vkd-language: nothing for it to act on"):
        C2VKD(STUDENT, TEACHER, c2vkd_language=1.0)


def test_clip_without_a_weight_is_refused(tmp_path):
    clip_file(tmp_path / "clip.pth")
    chosen = dict(c2vkd_clip=tmp_path / "clip.pth")
    build_method("c2vkd", STUDENT, TEACHER, **chosen)
    with pytest.raises(UserError, match="--c2vkd-clip has no effect with --c2vkd-language 0"):
        build_method("c2vkd", STUDENT, TEACHER, c2vkd_language=0.0, **chosen)


def test_it_is_zero_where_maps_agree(tmp_path):
    clip_file(tmp_path / "clip.pth")
    method = C2VKD(TEACHER, TEACHER, c2vkd_clip=tmp_path / "clip.pth", c2vkd_graph=1e4)
    method.pdd["reading"] = "dkd"
    torch.nn.init.dirac_(method.project.weight)
    same = output(TEACHER, (4, 8, 16, 32))
    method.describe.forward = lambda mean: method.pool(
        model.resize(same.features[3], same.features[2].shape[2:])
    )
    terms = method(same, same, None, some_labels())
    assert set(terms) == {"pdd", "global", "graph", "language"}
    assert all(abs(v.item()) < 1e-5 for v in terms.values())
    other = output(TEACHER, (4, 8, 16, 32), seed=3)
    terms = method(same, other, None, some_labels())
    assert all(v.item() > 1e-4 for v in terms.values())


@pytest.mark.parametrize("cnn", [True, False])
@pytest.mark.parametrize("size, batch", [((64, 96), 2), ((33, 47), 1), ((32, 32), 1)])
def test_gradients_reach_student_and_adapters_only(tmp_path, size, batch, cnn):
    clip_file(tmp_path / "clip.pth")
    method = C2VKD(STUDENT, TEACHER, c2vkd_clip=tmp_path / "clip.pth", c2vkd_graph=1e4)
    s, t = pair(size, batch, cnn)
    terms = method(s, t, None, some_labels(size, batch))
    assert all(v.shape == () and v.isfinite() for v in terms.values())
    sum(terms.values()).backward()
    assert s.logits.grad.any() and s.features[3].grad.any()
    for key, p in method.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), key
    assert not t.logits.requires_grad and t.features[3].grad is None
    void = torch.full((batch, *size), IGNORE, dtype=torch.uint8)
    assert method(s, t, None, void)["pdd"].item() == 0


def test_real_nets_and_bfloat16():
    student, teacher = model.build("nano", 4), model.build("b0", 4)
    method = build_method("c2vkd", student.channels, teacher.channels, c2vkd.METHODS)
    images, labels = torch.randn(2, 3, 64, 80), some_labels((64, 80), classes=4)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            seen = teacher(images)
        terms = method(student(images), seen, images, labels)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in terms.values())
    sum(terms.values()).backward()
    unused = [k for k, p in student.named_parameters() if p.grad is None]
    assert not unused and all(p.grad is None for p in teacher.parameters())


def test_losses_under_autocast_are_those_of_float32(tmp_path):
    clip_file(tmp_path / "clip.pth")
    method = C2VKD(STUDENT, TEACHER, c2vkd_clip=tmp_path / "clip.pth")
    (s, t), labels = pair(), some_labels()
    want = method(s, t, None, labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = method(s, t, None, labels)
    assert all(torch.equal(got[k], v) for k, v in want.items())


def test_it_takes_the_place_of_cross_entropy():
    """As published. --c2vkd-ce adds it, other methods keep it; in a+b they do not bring it back."""
    net, seen = model.build("nano", 5), output(TEACHER, (4, 8, 8, 8), (64, 64))
    images, labels = torch.randn(2, 3, 64, 64), some_labels((64, 64))
    for spec, options, terms in (
        ("c2vkd", {}, {"pdd", "global", "graph"}),
        ("c2vkd", dict(c2vkd_ce=True), {"ce", "pdd", "global", "graph"}),
        ("c2vkd+kd", {}, {"c2vkd/pdd", "c2vkd/global", "c2vkd/graph", "kd/kd"}),
        ("kd", {}, {"ce", "kd"}),
    ):
        method = build_method(spec, net.channels, TEACHER, methods.METHODS, **options)
        assert set(Learner(net, method)(images, labels, seen)) == terms
    assert set(Learner(net, NoDistillation(None, None))(images, labels, None)) == {"ce"}


def test_it_says_what_it_leaves_out(tmp_path):
    clip_file(tmp_path / "clip.pth")
    assert "without its linguistic term" in C2VKD(STUDENT, TEACHER).note
    assert not C2VKD(STUDENT, TEACHER, c2vkd_clip=tmp_path / "clip.pth").note
    with torch.device("meta"):  # as train.py tries it out
        assert C2VKD(STUDENT, TEACHER, c2vkd_clip=tmp_path / "clip.pth").pool.width == 32
