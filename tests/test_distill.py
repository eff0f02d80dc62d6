"""Losses against brute force, modules against their equations, gradients where they belong."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Largest

import baselines
import distill
import files
import manifold
import model
from methods import build_method

STUDENT, TEACHER = (8, 16, 24, 32), (16, 24, 40, 48)
METHODS = {**distill.METHODS, **baselines.METHODS}


def output(channels, size=32, batch=2, seed=0, grad=False, classes=5):
    """An Output as a net with these channels would give for a (4 * size)^2 image."""
    g = torch.Generator().manual_seed(seed)
    sides = [size >> i for i in range(4)]
    maps = [torch.randn(batch, c, n, n, generator=g) for c, n in zip(channels, sides)]
    tokens = [torch.randn(batch, n * n, c, generator=g) for c, n in zip(channels, sides)]
    logits = torch.randn(batch, classes, size, size, generator=g)
    tensors = [t.requires_grad_(grad) for t in (logits, *maps, *tokens)]
    return model.Output(tensors[0], tuple(tensors[1:5]), tuple(tensors[5:]))


# ------------------------------------------------------------------------------------------------
# losses


@pytest.mark.parametrize(
    "height, weights", [(1, []), (2, [1]), (4, [2, 1]), (5, [4, 2, 1]), (16, [4, 2, 1])]
)
def test_hcl_against_loops(height, weights):
    """weights: the levels that count at this height; each halves the weight of the one before."""
    width = height + 3
    a, b = torch.randn(2, 2, 3, height, width, dtype=torch.float64)
    total, norm, w = ((a - b) ** 2).mean().item(), 1.0, 1.0
    for level in weights:
        w, cells = w / 2, []
        for i in range(level):
            for j in range(level):
                rows = slice(i * height // level, -(-(i + 1) * height // level))
                cols = slice(j * width // level, -(-(j + 1) * width // level))
                cell = a[:, :, rows, cols].mean((2, 3)) - b[:, :, rows, cols].mean((2, 3))
                cells.append(cell**2)
        total, norm = total + w * torch.stack(cells).mean().item(), norm + w
    assert distill.hcl(a, b).item() == pytest.approx(total / norm, rel=1e-5)
    assert distill.hcl(a, a).item() == 0


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_cwd_against_loops(T):
    s, t = torch.randn(2, 2, 3, 4, 5)
    total = 0.0
    for b in range(2):
        for c in range(3):
            p = np.exp(t[b, c].double().numpy() / T)
            q = np.exp(s[b, c].double().numpy() / T)
            p, q = p / p.sum(), q / q.sum()
            total += (p * np.log(p / q)).sum()
    assert distill.cwd(s, t, T).item() == pytest.approx(T * T * total / 6, rel=1e-5)
    assert abs(distill.cwd(t, t, T).item()) < 1e-6


def test_kl_over_channels_against_torch():
    s, t = torch.randn(2, 2, 3, 4, 5)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 3).log_softmax(dim=1) for x in (s, t)]
    want = F.kl_div(*rows, reduction="batchmean", log_target=True)
    assert distill.FEATURE_LOSSES["kl"](s, t).item() == pytest.approx(want.item(), rel=1e-5)


def test_cwd_of_a_peaked_map_is_finite():
    s, t = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    s[0, 0, 0, 0], t[0, 0, 3, 3] = 1e4, 1e4
    assert distill.cwd(s, t).isfinite()


@pytest.mark.parametrize("n, ca, cb", [(3, 5, 4), (9, 4, 3), (9, 3, 12), (1, 2, 2), (64, 8, 5)])
def test_gram_difference_is_that_of_the_gram_matrices(n, ca, cb):
    """Both forms, value and gradient, against the n x n matrices; one that skips a term is not."""
    g = torch.Generator().manual_seed(n)
    a = torch.randn(2, 3, n, ca, generator=g, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 3, n, cb, generator=g, dtype=torch.float64)
    want = torch.zeros(2, 3, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            aa, bb = ((x[..., i, :] * x[..., j, :]).sum(-1) for x in (a, b))
            want = want + (aa - bb) ** 2 / n**2
    got = manifold.gram_difference(a, b)
    assert got.shape == (2, 3) and torch.allclose(got, want, rtol=1e-12)
    grads = [torch.autograd.grad(x.sum(), a, retain_graph=True)[0] for x in (got, want)]
    assert torch.allclose(*grads, rtol=1e-10, atol=1e-12)
    without = (a.mT @ a).square().sum((-2, -1)) / n**2 + (b.mT @ b).square().sum((-2, -1)) / n**2
    assert not torch.allclose(without, want, rtol=1e-3)
    assert manifold.gram_difference(a, a).abs().max() < 1e-12


def test_gram_difference_ignores_autocast():
    a, b = torch.randn(2, 1, 40, 6)
    with torch.autocast("cpu", torch.bfloat16):
        low = manifold.gram_difference(a, b), manifold.gram_difference(a[:, :4], b[:, :4])
    assert low[0].dtype == torch.float32 and torch.equal(low[0], manifold.gram_difference(a, b))
    assert torch.equal(low[1], manifold.gram_difference(a[:, :4], b[:, :4]))


def test_to_grid_averages_what_is_larger_and_interpolates_what_is_smaller():
    x = torch.arange(12.0).view(1, 1, 2, 6)
    assert distill.to_grid(x, (2, 6)).equal(x)
    assert distill.to_grid(x, (1, 3)).flatten().tolist() == [3.5, 5.5, 7.5]
    assert distill.to_grid(x, (4, 6)).equal(model.resize(x, (4, 6)))
    both = distill.to_grid(x, (4, 3))  # taller and narrower
    assert both.equal(model.resize(x.unflatten(3, (3, 2)).mean(4), (4, 3)))


@pytest.mark.parametrize("chunk", [1, 10**9])  # an image at a time, all at once
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [(37, 23), (10, 6)])  # of the labels; the second is the logits'
def test_cross_entropy_and_gradient_at_any_size(monkeypatch, chunk, weighted, size):
    monkeypatch.setitem(distill.CHUNK, "cpu", chunk)
    logits = torch.randn(3, 5, 10, 6, requires_grad=True)
    labels = torch.randint(0, 5, (3, *size), dtype=torch.uint8)
    labels[0, :3], labels[2] = 255, 255
    weights = torch.rand(5) + 0.5 if weighted else None
    up = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    want = F.cross_entropy(up, labels.long(), weights, ignore_index=255)
    got = distill.cross_entropy(logits, labels, weights)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    (want,), (got,) = (torch.autograd.grad(3 * loss, logits) for loss in (want, got))
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-7)


def test_cross_entropy_holds_one_image_at_full_size(monkeypatch):
    monkeypatch.setitem(distill.CHUNK, "cpu", 10**6)
    logits = torch.randn(4, 6, 10, 10, requires_grad=True)
    labels = torch.randint(0, 6, (4, 400, 400))
    with Largest() as seen:
        distill.cross_entropy(logits, labels).backward()
    assert seen.numel <= 6 * 400 * 400
    with Largest() as seen:
        F.cross_entropy(model.resize(logits, (400, 400)), labels).backward()
    assert seen.numel == 4 * 6 * 400 * 400


def test_all_void_crop_gives_zero_not_nan():
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    loss = distill.cross_entropy(logits, torch.full((2, 16, 16), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


# ------------------------------------------------------------------------------------------------
# modules


def csf_by_the_equations(csf, features):
    """CSF written out per sample and stage, with numpy-like steps and no shared code."""
    out, deeper = [None] * 4, None
    for i in (3, 2, 1, 0):
        conv, bn = csf.reduce[i]
        x = torch.einsum("bchw,oc->bohw", features[i], conv.weight[:, :, 0, 0])
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        x = (x - mean) / (var + bn.eps).sqrt()  # fresh batch norms: weight 1, bias 0
        if deeper is not None:
            r = deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
            g = x.mean((2, 3)) + r.mean((2, 3))
            z = torch.relu(g @ csf.squeeze[i][0].weight[:, :, 0, 0].T)
            ax, ar = (
                z @ layer.weight[:, :, 0, 0].T + layer.bias
                for layer in (csf.attend_x[i], csf.attend_r[i])
            )
            share = torch.sigmoid(ax - ar)[:, :, None, None]  # a softmax over two
            x = share * x + (1 - share) * r
        deeper = x
        y = F.conv2d(x, csf.expand[i][0].weight, padding=1)
        mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
        out[i] = (y - mean) / (var + 1e-5).sqrt()
    return out


def test_csf_follows_its_equations():
    csf = distill.CrossSelectiveFusion(STUDENT, TEACHER).double()
    features = [f.double() for f in output(STUDENT).features]
    for got, want, c in zip(csf(features), csf_by_the_equations(csf, features), TEACHER):
        assert got.shape[1] == c
        assert torch.allclose(got, want, atol=1e-9)


def test_csf_fuses_from_deep_to_shallow():
    """Stage 1 is made from all four stages, stage 4 from itself alone."""
    csf = distill.CrossSelectiveFusion(STUDENT, TEACHER)
    reach = []
    for i in range(4):
        out = output(STUDENT, grad=True)
        (csf(out.features)[i] * torch.randn_like(csf(out.features)[i])).sum().backward()
        reach.append([f.grad is not None and bool(f.grad.any()) for f in out.features])
    assert reach == [[k >= i for k in range(4)] for i in range(4)]


def test_released_csf_norm_knows_two_branches(monkeypatch):
    """At batch 2 its batch norm makes z of one sample minus that of the other; at batch 1 another
    layer is used. Every parameter has a gradient in both, as DDP needs."""
    csf = distill.CrossSelectiveFusion(STUDENT, TEACHER, norm="batch")
    conv, bn, _ = csf.squeeze[0].many
    g = torch.randn(2, 64, 1, 1)
    z = bn(conv(g))[:, :, 0, 0]
    assert torch.allclose(z[0], -z[1], atol=1e-5) and z.abs().max() < 1.001
    for batch in (1, 2):
        csf.zero_grad()
        sum(f.square().sum() for f in csf(output(STUDENT, batch=batch).features)).backward()
        assert all(p.grad is not None for p in csf.parameters())
        assert csf.squeeze[0].single[0].weight.grad.any() == (batch == 1)
        assert csf.squeeze[0].many[0].weight.grad.any() == (batch == 2)
    monkeypatch.setattr(distill, "rank_and_world", lambda: (1, 2))
    csf.eval().zero_grad()  # the norm would be synchronised
    sum(f.square().sum() for f in csf(output(STUDENT, batch=1).features)).backward()
    assert csf.squeeze[0].many[0].weight.grad.any()  # two images in all


def test_default_csf_does_not_mix_samples_in_its_attention():
    """But for the batch norms before it, hence eval()."""
    csf = distill.CrossSelectiveFusion(STUDENT, TEACHER).eval()
    features = output(STUDENT, batch=2).features
    alone = csf([f[:1] for f in features])
    assert all(torch.allclose(a[0], b[0], atol=1e-5) for a, b in zip(csf(features), alone))


def test_pea_is_one_linear_a_stage():
    method = build_method("transkd-base", STUDENT, TEACHER, feature_loss="none")
    s, t = output(STUDENT), output(TEACHER, seed=1)
    want = 0.0
    for i, alpha in enumerate((0.1, 0.1, 0.5, 1.0)):
        layer = method.pea.linears[i]
        p = s.embeddings[i] @ layer.weight.T + layer.bias
        want += alpha * ((p - t.embeddings[i]) ** 2).mean().item()
    assert method(s, t, None, None)["embeddings"].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_single_stage_pea_has_weight_one(stage):
    method = build_method("transkd-base", STUDENT, TEACHER, embed=str(stage))
    s, t = output(STUDENT), output(TEACHER, seed=1)
    p = method.pea.linears[0](s.embeddings[stage - 1])
    want = F.mse_loss(p, t.embeddings[stage - 1]).item()
    assert method(s, t, None, None)["embeddings"].item() == pytest.approx(want, rel=1e-5)


def test_gl_mixer_follows_its_equation():
    mixer = distill.GLMixer(16, heads=2, init=0.25).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    q, k, v = (x @ w.T for w in mixer.qkv.weight.chunk(3))
    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        heads.append((q[..., h] @ k[..., h].transpose(1, 2) / 8**0.5).softmax(-1) @ v[..., h])
    y = mixer.proj(torch.cat(heads, -1))
    padded = F.pad(x, (0, 0, 1, 1))  # one token of zeros before and after
    conv, gate = (
        sum(padded[:, d : d + 5] @ c.weight[:, :, d].T for d in range(3)) + c.bias
        for c in (mixer.conv, mixer.gate)
    )
    want = 0.25 * y + 0.25 * conv * gate.sigmoid()
    assert torch.allclose(mixer(x), want, atol=1e-12)
    mixer.residual = True
    assert torch.allclose(mixer(x), want + x, atol=1e-12)


def test_weights_start_as_in_the_release():
    """Standard deviations: He's by fan out for convs of SegFormer, uniform by fan in for CSF's."""
    channels = model.build("b0", 3).channels
    ea = build_method("transkd-ea", channels, (64, 128, 320, 512))
    for i, assistant in enumerate(ea.pea.assistants):
        fan_out = (49 if i == 0 else 9) * assistant.proj.out_channels
        assert assistant.proj.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert not assistant.proj.bias.any()
    conv, _ = distill.conv_bn(64, 128, 3)
    limit = (3 / (9 * 64)) ** 0.5
    assert conv.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.02)
    assert 0.99 * limit < conv.weight.abs().max() <= limit
    fuse = model.build("b0", 3).head.fuse
    assert fuse.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert build_method("transkd-gl", channels, channels).pea.mixer.heads == 8


def test_gl_mixer_is_at_stage_4_only():
    base = build_method("transkd-base", STUDENT, TEACHER)
    gl = build_method("transkd-gl", STUDENT, TEACHER)
    extra = {k for k in gl.state_dict() if k not in base.state_dict()}
    assert extra and all(k.startswith("pea.mixer.") for k in extra)
    gl.load_state_dict(base.state_dict(), strict=False)
    s = output(STUDENT)
    a, b = base.pea(s, None), gl.pea(s, None)
    assert [torch.equal(x, y) for x, y in zip(a, b)] == [True, True, True, False]


def test_embedding_assistant_follows_its_equation():
    net = model.build("nano", 3)
    method = build_method("transkd-ea", net.channels, TEACHER)
    images = torch.randn(2, 3, 64, 96)
    out = net(images)
    got = method.pea(out, images)
    u, v = (0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)
    for i, source in enumerate((images, *out.features[:3])):
        ea, linear = method.pea.assistants[i], method.pea.linears[i]
        assert ea.proj.kernel_size == ((7, 7) if i == 0 else (3, 3)) and ea.norm.eps == 1e-5
        want = u[i] * linear(out.embeddings[i]) + v[i] * ea(source)[0]
        assert got[i].shape == (2, out.embeddings[i].shape[1], TEACHER[i])
        assert torch.allclose(got[i], want, atol=1e-6)


# ------------------------------------------------------------------------------------------------
# methods


@pytest.mark.parametrize("csf", ["none", "batch"])
@pytest.mark.parametrize("name, faithful", [("base", 4563124), ("gl", 5219254), ("ea", 5534076)])
def test_parameters_of_the_training_wrapper(name, faithful, csf):
    """With the released CSF, the parameters that TransKD's table reports for B2 -> B0."""
    with torch.device("meta"):
        s, t = model.build("b0", 20), model.build("b2", 20)
        method = build_method(f"transkd-{name}", s.channels, t.channels, csf_norm=csf)
    saved = 0 if csf == "batch" else 3 * (64 * 32 + 2 * 32)  # no second layer, no batch norm
    assert model.count_parameters(s) + model.count_parameters(method) == faithful - saved


@pytest.mark.parametrize("name", ["transkd-base", "transkd-gl", "transkd-ea", "kd"])
@pytest.mark.parametrize("loss", ["hcl", "cwd", "kl"])
def test_gradients_reach_student_and_adapters_only(name, loss):
    options = {} if name == "kd" else dict(feature_loss=loss)
    torch.manual_seed(0)
    student, teacher = model.build("nano", 4), model.build("b0", 4)
    method = build_method(name, student.channels, teacher.channels, METHODS, **options)
    images = torch.randn(2, 3, 128, 160)
    with torch.no_grad():
        seen = teacher(images, head=method.needs_head)
    sum(method(student(images), seen, images, None).values()).backward()
    for key, p in method.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
        assert p.grad.any(), key
    for key, p in student.named_parameters():
        if name == "kd" or not key.startswith("head"):
            assert p.grad is not None and p.grad.isfinite().all(), key
        else:
            assert p.grad is None, key  # no TransKD term looks at the head
    assert all(p.grad is None for p in teacher.parameters())


def test_zero_when_student_and_teacher_agree():
    """With identity adapters every term vanishes for equal networks, and for no others."""
    net = model.build("nano", 4).eval()
    method = build_method("transkd-base", net.channels, net.channels)
    method.csf = torch.nn.Identity()
    for layer in method.pea.linears:
        torch.nn.init.eye_(layer.weight), torch.nn.init.zeros_(layer.bias)
    out = net(torch.randn(1, 3, 64, 64))
    assert all(v.item() == 0 for v in method(out, out, None, None).values())
    other = net(torch.randn(1, 3, 64, 64))
    assert all(v.item() > 0 for v in method(out, other, None, None).values())
    kd = baselines.PixelKD(None, None)
    assert abs(kd(out, out, None, None)["kd"].item()) < 1e-6 < kd(out, other, None, None)["kd"]


def test_kd_against_loops():
    s, t = output(STUDENT, size=8), output(TEACHER, size=8, seed=1)
    total = 0.0
    for b in range(2):
        for y in range(8):
            for x in range(8):
                p = np.exp(t.logits[b, :, y, x].double().numpy() / 3)
                q = np.exp(s.logits[b, :, y, x].double().numpy() / 3)
                p, q = p / p.sum(), q / q.sum()
                total += (p * np.log(p / q)).sum()
    kd = baselines.PixelKD(None, None, kd_weight=5.0, temperature=3.0)(s, t, None, None)["kd"]
    assert kd.item() == pytest.approx(5 * 9 * total / 128, rel=1e-5)


@pytest.mark.parametrize("pair", [("nano", "b0"), ("b0", "b1"), ("b0", "b5"), ("b1", "b4")])
@pytest.mark.parametrize("size", [(33, 47), (64, 32)])
def test_any_pair_at_any_size(pair, size):
    with torch.device("meta"):
        s, t = (model.build(name, 3) for name in pair)
        images, labels = torch.empty(2, 3, *size), torch.empty(2, *size, dtype=torch.uint8)
        student, teacher = s(images), t(images)
        for name in METHODS:
            known = (METHODS, (s.width, t.width), 3)
            method = build_method(name, s.channels, t.channels, *known)
            terms = method(student, teacher, images, labels)
            assert all(v.shape == () for v in terms.values())


def test_ablations():
    s, t = output(STUDENT), output(TEACHER, seed=1)
    both = build_method("transkd-base", STUDENT, TEACHER)(s, t, None, None)
    assert set(both) == {"features", "embeddings"}
    csf = build_method("transkd-base", STUDENT, TEACHER, embed="none")
    pea = build_method("transkd-base", STUDENT, TEACHER, feature_loss="none")
    assert set(csf(s, t, None, None)) == {"features"} and csf.pea is None
    assert set(pea(s, t, None, None)) == {"embeddings"} and pea.csf is None
    torch.manual_seed(0)
    one = build_method("transkd-base", STUDENT, TEACHER)(s, t, None, None)
    torch.manual_seed(0)
    two = build_method("transkd-base", STUDENT, TEACHER, feature_weight=2.0, embed_weight=3.0)
    two = two(s, t, None, None)
    assert two["features"].item() == pytest.approx(2 * one["features"].item())
    assert two["embeddings"].item() == pytest.approx(3 * one["embeddings"].item())
    none = build_method("transkd-base", STUDENT, TEACHER, feature_weight=0)
    assert none.csf is None and set(none(s, t, None, None)) == {"embeddings"}


def test_methods_combine():
    method = build_method("transkd-base+kd", STUDENT, TEACHER, METHODS, temperature=4.0)
    assert method.needs_teacher and method.needs_head
    terms = method(output(STUDENT), output(TEACHER, seed=1), None, None)
    assert set(terms) == {"transkd-base/features", "transkd-base/embeddings", "kd/kd"}


@pytest.mark.parametrize(
    "spec, options, words",
    [
        ("transkd", {}, "unknown method 'transkd'"),
        ("kd+kd", {}, "twice"),
        ("kd", dict(csf_norm="batch"), "--csf-norm has no effect on --method kd"),
        ("none", dict(temperature=2.0), "--temperature has no effect"),
        ("none+kd", {}, "none goes with no other"),
        (
            "transkd-base",
            dict(feature_loss="none", embed="none"),
            "both left out: there is nothing",
        ),
        ("transkd-base", dict(feature_weight=0, embed="none"), "both left out: there is nothing"),
        ("transkd-base", dict(feature_weight=0, csf_norm="batch"), "--csf-norm: there is"),
        ("transkd-base", dict(embed="none", embed_weight=0), "--embed-weight: there is"),
        ("transkd-base", dict(embed_weight=0, embed="2"), "--embed: there is"),
        ("transkd-base", dict(feature_loss="none", csf_norm="batch"), "--csf-norm: there is"),
        ("transkd-base", dict(feature_weight=0, feature_loss="cwd"), "--feature-loss: there is"),
        ("transkd-ea", dict(gl_residual=True), "--gl-init or --gl-residual: there is"),
        ("transkd-gl", dict(embed="2"), "no embeddings of stage 4, and their mixer: there is"),
    ],
)
def test_bad_specs(spec, options, words):
    with pytest.raises(files.UserError, match=words):
        build_method(spec, STUDENT, TEACHER, METHODS, **options)


@pytest.mark.parametrize("spec", ["transkd-base", "transkd-gl", "transkd-ea+kd"])
def test_losses_stay_in_float32_under_autocast(spec):
    net, teacher = model.build("nano", 4).eval(), model.build("b0", 4).eval()
    method = build_method(spec, net.channels, teacher.channels, METHODS)
    images = torch.randn(2, 3, 64, 64)
    labels = torch.randint(0, 4, (2, 64, 64))
    terms = []
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out, seen = net(images), teacher(images)
            terms.append(method(out, seen, images, labels))
            terms[low]["ce"] = distill.cross_entropy(out.logits, labels)
    assert out.logits.dtype == torch.bfloat16
    for name, v in terms[True].items():
        assert v.dtype == torch.float32
        assert v.item() == pytest.approx(terms[False][name].item(), rel=0.1), name


def test_class_weights_may_add_up_to_less_than_one():
    torch.manual_seed(0)
    logits, class_weights = torch.randn(1, 3, 4, 4), torch.tensor([0.1, 0.2, 0.05])
    labels = torch.full((1, 4, 4), 255)
    labels[0, 1, 2] = 1
    want = F.cross_entropy(logits, labels, weight=class_weights, ignore_index=255)
    got = distill.cross_entropy(logits, labels, class_weights)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_an_assistant_alone_starts_as_among_the_four(stage):
    pea = build_method("transkd-ea", STUDENT, STUDENT, embed=str(stage)).pea
    assert pea.u[0].item() == pytest.approx(0.1 * stage)
    assert pea.v[0].item() == pytest.approx(0.4 + 0.1 * stage)


def test_one_of_several_methods_may_replace_the_cross_entropy():
    assert build_method("c2vkd+kd", STUDENT, TEACHER).replaces_ce
    assert not build_method("transkd-base+kd", STUDENT, TEACHER).replaces_ce
