"""PVTv2 and LVT: sizes, statements of their parts in loops, others' files, and the commands."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import write_folder
from test_train import run

import eval as evaluation
import files
import flops
import model
import others
import weights

NAMES = ("lvt", *(f"pvt_v2_b{n}" for n in range(6)))
# with 20 classes; of the encoder; published millions, with ImageNet's classifier
COUNTS = dict(
    pvt_v2_b0=(7527668, 3409760, 3.7),
    pvt_v2_b1=(17744980, 13496000, 14.0),
    pvt_v2_b2=(29098836, 24849856, 25.4),
    pvt_v2_b3=(48974676, 44725696, 45.2),
    pvt_v2_b4=(66292052, 62043072, 62.6),
    pvt_v2_b5=(85691988, 81443008, 82.0),
    lvt=(3837176, 3429092, None),
)


def randomise(net):
    """Every tensor random, norms and biases too."""
    torch.manual_seed(0)
    for t in net.state_dict().values():
        if t.is_floating_point():
            t.uniform_(0.5, 1.5) if t.ndim == 1 else t.normal_(0, 0.05)
    return net.eval()


# ------------------------------------------------------------------------------------------------
# the contract


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts(name):
    with torch.device("meta"):
        net = model.build(name, 20)
        mit_b5 = model.build("b5", 20).encoder.state_dict()
    total, encoder, published = COUNTS[name]
    assert model.count_parameters(net) == total
    assert model.count_parameters(net.encoder) == encoder
    if published:
        assert round((encoder + 1000 * (net.channels[3] + 1)) / 1e6, 1) == published
    shapes = {k: t.shape for k, t in net.encoder.state_dict().items()}
    same = shapes == {k: t.shape for k, t in mit_b5.items()}
    assert same == (name == "pvt_v2_b5")


@pytest.mark.parametrize("name", ["lvt", "pvt_v2_b0"])
def test_contract_of_a_net(name):
    with pytest.raises(files.UserError, match=f"unknown model 'b9'.*nano.*b5.*{name}"):
        model.build("b9", 2)
    net = randomise(model.build(name, 5))
    with pytest.raises(files.UserError, match=f"31x64 pixels: {name} needs 32x32"):
        net(torch.zeros(1, 3, 31, 64))
    x = torch.randn(1, 3, 64, 64)
    out = net(x)
    net.head.forward = None  # calling it would raise
    bare = net(x, head=False)
    assert bare.logits is bare.decoded is None and torch.equal(bare.features[3], out.features[3])


def test_what_the_classifier_gets():
    """decoded, and between the two a ReLU in LVT, nothing in PVTv2."""
    x = torch.randn(1, 3, 64, 64)
    for name in ("lvt", "pvt_v2_b0"):
        net = randomise(model.build(name, 5))
        out = net(x)
        plain = net.head.classifier(out.decoded)
        assert torch.equal(net.head.classifier(F.relu(out.decoded)), out.logits)
        assert torch.equal(plain, out.logits) == (name == "pvt_v2_b0")


@pytest.mark.parametrize("name", ["lvt", "pvt_v2_b0"])
def test_drop_rates(name):
    def rates(**kw):
        net = model.build(name, 5, **kw)
        blocks = [block.drop_path.p for stage in net.encoder.stages for block in stage.blocks]
        return blocks[0], blocks[-1], net.head.drop.p

    assert rates() == ((0, 0, 0) if name == "lvt" else (0, 0.1, 0.1))
    assert rates(drop_path=0.2, dropout=0.3) == (0, 0.2, 0.3)


@pytest.mark.parametrize("name", ["lvt", "pvt_v2_b0"])
def test_every_parameter_has_a_gradient(name):
    """As DDP wants it; in bfloat16, and on channels-last maps."""
    torch.manual_seed(0)
    net = model.build(name, 3).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(torch.randn(2, 3, 64, 64))
        out.logits.float().square().mean().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key


def test_lvt_compiles_and_exports():
    dims = (16, 16, 32, 64)
    encoder = others.lvt(dims, (2, 2, 4, 4), (1, 1, 1, 1), drop_path=0)
    net = randomise(model.Segmenter("lvt", encoder, model.SegFormerHead(dims, 32, 5, dropout=0)))
    x = torch.randn(1, 3, 64, 64)
    want = net(x).logits
    assert torch.allclose(torch.export.export(net, (x,)).module()(x).logits, want, atol=1e-4)
    graph = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.allclose(graph(x).logits, want, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# PVTv2


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    dims, heads, depths, _ = model.MODELS[name]
    config = transformers.PvtV2Config(
        hidden_sizes=list(dims),
        num_attention_heads=list(heads),
        depths=list(depths),
        mlp_ratios=list(others.PVT_MLP_RATIOS[name]),
        num_labels=1000,
    )
    return randomise(transformers.PvtV2ForImageClassification(config))


@pytest.mark.parametrize("name, form", [("pvt_v2_b0", "memory"), ("pvt_v2_b2", "folder")])
@torch.no_grad()
def test_equals_hugging_face(tmp_path, capsys, name, form):
    """Features and embeddings of its PVTv2 with the same weights, once its norms have our eps."""
    theirs = hugging_face(name)
    if form == "folder":
        theirs.save_pretrained(tmp_path)
    else:
        torch.save(theirs.state_dict(), tmp_path / "x.pth")
    net = model.build(name, 5).eval()
    model.load_weights(net, tmp_path if form == "folder" else tmp_path / "x.pth")
    said = capsys.readouterr().out
    n = len(net.encoder.state_dict())
    assert f"loaded {n} of {len(net.state_dict())} tensors" in said
    assert re.search(r"2 not used: classifier.\w+, classifier.\w+\n", said)
    net, theirs = net.double(), theirs.pvt_v2.double()
    x = torch.randn(1, 3, 65, 97, dtype=torch.float64)
    ours, embeddings = net(x, head=False), []
    for layer in theirs.encoder.layers:
        layer.patch_embedding.register_forward_hook(lambda _, i, out: embeddings.append(out[0]))

    def difference():
        embeddings.clear()
        maps = theirs(x, output_hidden_states=True).hidden_states
        pairs = [*zip(ours.features, maps), *zip(ours.embeddings, embeddings)]
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

    assert 1e-9 < difference() < 1e-3  # eps 1e-6 in all of its norms
    for layer in theirs.encoder.layers:
        layer.patch_embedding.layer_norm.eps = 1e-5  # as in the original code
        for block in layer.blocks:
            if hasattr(block.attention, "layer_norm"):
                block.attention.layer_norm.eps = 1e-5
    assert difference() < 1e-12


def pyramid_head(head, features, mutant=None):
    """The Semantic-FPN head from its tensors, with sampling by index and by explicit weights."""
    p = dict(head.named_parameters())

    def conv(x, name):
        return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding="same")

    def nearest(x, size):
        rows, cols = (torch.arange(n) * m // n for n, m in zip(size, x.shape[2:]))
        return x[:, :, rows][:, :, :, cols]

    def bilinear(x, size):
        for axis, n in zip((2, 3), size):
            m = x.shape[axis]
            at = ((torch.arange(n, dtype=x.dtype) + 0.5) * m / n - 0.5).clamp(min=0)
            low = at.long()
            share = (at - low).view(-1, *[1] * (3 - axis))
            a, b = (x.index_select(axis, k.clamp(max=m - 1)) for k in (low, low + 1))
            x = a * (1 - share) + b * share
        return x

    sides = [f.shape[2:] for f in features]
    laterals = [conv(f, f"laterals.{i}") for i, f in enumerate(features)]
    for i in (3, 2, 1):
        up = bilinear if mutant == "bilinear pyramid" else nearest
        if mutant != "no pyramid":
            laterals[i - 1] = laterals[i - 1] + up(laterals[i], sides[i - 1])
    total = 0
    for i in range(4):
        x = laterals[i] if mutant == "no smoothing" else conv(laterals[i], f"smooths.{i}")
        for k in range(max(1, i)):
            x = conv(x, f"branches.{i}.{k}")
            x = x if mutant == "no ReLU" else x.relu()
            if i:
                x = bilinear(x, [2 * n for n in x.shape[2:]])
        total = total + bilinear(x, sides[0])
    return total


@pytest.mark.parametrize("size", [(64, 96), (65, 99)])
@torch.no_grad()
def test_pyramid_head_is_its_statement(size):
    net = randomise(model.build("pvt_v2_b0", 5, head_width=24)).double()
    out = net(torch.randn(2, 3, *size, dtype=torch.float64))
    assert torch.allclose(out.decoded, pyramid_head(net.head, out.features), atol=1e-10)
    for mutant in ("bilinear pyramid", "no pyramid", "no smoothing", "no ReLU"):
        other = pyramid_head(net.head, out.features, mutant)
        assert (out.decoded - other).abs().max() > 1e-3, mutant


# ------------------------------------------------------------------------------------------------
# LVT: its two attentions in loops over everything


def csa(attn, x, H, W, mutant=None):
    """One image (H * W, C): windows, heads and places one after the other."""
    C, heads = x.shape[1], attn.heads
    c = C // heads
    image = x.view(H, W, C)
    matrices = attn.weight.view(9, C, C)
    out = torch.zeros(H, W, C, dtype=x.dtype)
    places = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]

    def inside(r, s):
        return 0 <= r < H and 0 <= s < W

    for top in range(0, H, 2):
        for left in range(0, W, 2):
            own = [(top + a, left + b) for a in (0, 1) for b in (0, 1)]
            own = [image[r, s] for r, s in own if inside(r, s)]
            logits = attn.attn(sum(own) / (4 if mutant == "zeros in the mean" else len(own)))
            logits = logits.view(heads, 9, 9) * (1 if mutant == "no scale" else c**-0.5)
            a = logits.softmax(dim=1 if mutant == "softmax of queries" else 2)
            v = []
            for k, (dy, dx) in enumerate(places):
                r, s = top + dy, left + dx
                pixel = image[r, s] if inside(r, s) else torch.zeros(C, dtype=x.dtype)
                v.append(matrices[0 if mutant == "one matrix" else k] @ pixel)
            for i, (dy, dx) in enumerate(places):
                r, s = top + dy, left + dx
                if not inside(r, s):
                    continue
                for h in range(heads):
                    at = slice(h * c, (h + 1) * c)
                    y = sum(a[h, i, j] * v[j][at] for j in range(9))
                    if mutant == "no overlap":
                        out[r, s, at] = y
                    else:
                        out[r, s, at] += y
    return attn.proj(out.view(H * W, C))


CSA_MUTANTS = ("zeros in the mean", "no scale", "softmax of queries", "one matrix", "no overlap")


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 2)])
@torch.no_grad()
def test_convolutional_attention_is_its_statement(size):
    attn = randomise(others.ConvolutionalAttention(6, heads=2)).double()
    for p in attn.parameters():
        p.normal_()
    x = torch.randn(2, size[0] * size[1], 6, dtype=torch.float64)
    got = attn(x, *size)
    for image, want in zip(x, got):
        assert torch.allclose(want, csa(attn, image, *size), atol=1e-11)
    if size == (5, 3):
        for mutant in CSA_MUTANTS:
            assert (got[0] - csa(attn, x[0], *size, mutant)).abs().max() > 1e-2, mutant


def rasa(attn, x, H, W, mutant=None):
    """One image (H * W, C): two rounds, pixels, dilations and heads one after the other."""
    C, heads, sr = x.shape[1], attn.heads, attn.sr_ratio
    c = C // heads

    def silu(t):
        return t * torch.sigmoid(t)

    def queries(x):
        plain = (x @ attn.q.weight.T).view(H, W, C)
        out = torch.zeros(H, W, C, dtype=x.dtype)
        dilations = (1,) if mutant == "one scale" else (1, 3, 5)
        for d in dilations:
            total = torch.zeros(H, W, C, dtype=x.dtype)
            for r in range(H):
                for s in range(W):
                    for a in range(3):
                        for b in range(3):
                            y, z = r + d * (a - 1), s + d * (b - 1)
                            if 0 <= y < H and 0 <= z < W:
                                total[r, s] += attn.ds[:, 0, a, b] * plain[y, z]
            out += total if mutant == "no SiLU in queries" else silu(total)
        return out.view(H * W, C) / (3 if mutant == "mean of scales" else 1)

    def attention(x):
        small = x
        if sr > 1:
            image, rows = x.view(H, W, C), []
            for r in range(H // sr):
                for s in range(W // sr):
                    patch = image[r * sr : (r + 1) * sr, s * sr : (s + 1) * sr]
                    rows.append(torch.einsum("oiab,abi->o", attn.sr.weight, patch) + attn.sr.bias)
            small = torch.stack(rows)
            mean, var = small.mean(1, keepdim=True), small.var(1, unbiased=False, keepdim=True)
            small = (small - mean) / (var + 1e-5).sqrt() * attn.norm.weight + attn.norm.bias
        q = x @ attn.q.weight.T if mutant == "plain queries" else queries(x)
        k, v = (small @ w.T for w in attn.kv.weight.chunk(2))
        parts = []
        for h in range(heads):
            at = slice(h * c, (h + 1) * c)
            parts.append((q[:, at] @ k[:, at].T / math.sqrt(c)).softmax(dim=1) @ v[:, at])
        return attn.proj(torch.cat(parts, dim=1))

    y = silu(attention(x))
    if mutant == "one round":
        return y
    z = attention(y if mutant == "no residual" else x + y)
    return z if mutant == "no last SiLU" else silu(z)


RASA_MUTANTS = ("one scale", "no SiLU in queries", "mean of scales", "plain queries", "one round")
RASA_MUTANTS += ("no residual", "no last SiLU")


@pytest.mark.parametrize("size, sr", [((4, 5), 1), ((6, 7), 2)])
@torch.no_grad()
def test_recursive_atrous_attention_is_its_statement(size, sr):
    attn = randomise(others.RecursiveAtrousAttention(6, 2, sr)).double()
    for p in attn.parameters():
        p.normal_()
    x = torch.randn(2, size[0] * size[1], 6, dtype=torch.float64)
    got = attn(x, *size)
    for image, want in zip(x, got):
        assert torch.allclose(want, rasa(attn, image, *size), atol=1e-11)
    for mutant in RASA_MUTANTS:
        assert (got[0] - rasa(attn, x[0], *size, mutant)).abs().max() > 1e-2, mutant
    assert attn.q.bias is attn.kv.bias is None and attn.proj.bias is not None


@torch.no_grad()
def test_lvt_is_its_stages():
    """Embeddings before their norm; CSA and RASA, plain and Mix MLPs; no norm at the end."""

    def norm(t, layer):
        return F.layer_norm(t, t.shape[2:], layer.weight, layer.bias, 1e-5)

    net = randomise(model.build("lvt", 5)).double()
    x = torch.randn(1, 3, 65, 70, dtype=torch.float64)
    out = net(x, head=False)
    for i, stage in enumerate(net.encoder.stages):
        conv = stage.patch_embed.proj
        x = F.conv2d(x, conv.weight, conv.bias, 4 if i == 0 else 2, 3 if i == 0 else 1)
        H, W = x.shape[2:]
        t = x.flatten(2).transpose(1, 2)  # (1, H * W, C)
        assert torch.allclose(out.embeddings[i], t, atol=1e-10)
        t = norm(t, stage.patch_embed.norm)
        for block in stage.blocks:
            t = t + block.attn(norm(t, block.norm1), H, W)
            m = block.mlp.fc1(norm(t, block.norm2))
            if i > 0:
                m = m.transpose(1, 2).unflatten(2, (H, W))
                m = F.conv2d(m, block.mlp.dwconv.weight, block.mlp.dwconv.bias, 1, 1, 1, m.shape[1])
                m = m.flatten(2).transpose(1, 2)
            t = t + block.mlp.fc2(m * 0.5 * (1 + torch.erf(m / 2**0.5)))
        x = t.transpose(1, 2).unflatten(2, (H, W))
        assert torch.allclose(out.features[i], x, atol=1e-9)
        kind = others.ConvolutionalAttention if i == 0 else others.RecursiveAtrousAttention
        assert all(isinstance(block.attn, kind) for block in stage.blocks)
        assert stage.blocks[0].mlp.fc1.out_features == net.channels[i] * (4, 8, 4, 4)[i]
        assert i == 0 or stage.blocks[0].attn.sr_ratio == (8, 4, 2, 1)[i]


def test_initialisation_of_lvt():
    torch.manual_seed(0)
    stages = model.build("lvt", 5).encoder.stages
    weight = stages[0].blocks[0].attn.weight  # He, fan out of 9 * 64, whatever its groups
    assert weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.01)
    ds = stages[3].blocks[0].attn.ds  # uniform, He, fan in of 9
    assert ds.abs().max().item() == pytest.approx((6 / 9) ** 0.5, rel=0.01)
    assert stages[3].blocks[0].attn.q.weight.std().item() == pytest.approx(0.02, rel=0.02)


# ------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("name", ["nano", *(f"b{n}" for n in range(6)), *NAMES])
def test_recognised_by_its_tensors(name):
    with torch.device("meta"):
        net = model.build(name, 7, head_width=48)
    assert model.recognise("x", net.state_dict(), {}) == (name, 7, 48)


@pytest.mark.parametrize("name", ["lvt", "pvt_v2_b0"])
def test_save_and_load(tmp_path, name):
    net = randomise(model.build(name, 4, head_width=40))
    model.save(tmp_path / "x.pt", net, classes=list("abcd"))
    again, facts = model.load(tmp_path / "x.pt")
    x = torch.randn(1, 3, 40, 50)
    assert torch.equal(again(x).logits, net(x).logits) and facts["classes"] == list("abcd")
    assert (again.name, again.width, again.channels) == (name, 40, net.channels)
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    assert torch.equal(model.load(tmp_path / "plain.pt")[0](x).logits, net(x).logits)


def public(state):
    """Our state dict under its authors' names: PVTv2's or LVT's, head as in TransKD's release."""
    out = {}
    lvt = "head.fuse.weight" in state
    for name, t in state.items():
        word = name.split(".")
        i = int(word[2]) if word[0] == "encoder" else None
        if lvt and i is not None:
            rest = ".".join(word[4:])
            new = f"backbone.{i}.0.{rest}" if word[3] == "patch_embed" else f"backbone.{i}.1.{rest}"
            new = re.sub(r"\.attn\.(weight|ds)$", r".attn.\1.weight", new)
            new = new.replace("dwconv", "depconv")
            if i > 0 and re.search(r"fc\d.weight", new):
                t = t[:, :, None, None]
        elif i is not None:
            part = {"patch_embed": "patch_embed", "blocks": "block", "norm": "norm"}[word[3]]
            rest = ".".join(word[4:]).replace("mlp.dwconv", "mlp.dwconv.dwconv")
            new = f"backbone.{part}{i + 1}.{rest}"
        elif word[1] == "linears":
            new = f"linear_c{int(word[2]) + 1}.proj.{word[3]}"
        elif word[1] == "classifier":
            new = f"linear_pred.{word[2]}" if lvt else f"head.conv_seg.{word[2]}"
        elif lvt:
            new = f"linear_fuse.{dict(fuse='conv', norm='bn')[word[1]]}.{word[2]}"
        elif word[1] == "branches":
            new = f"head.scale_heads.{word[2]}.{2 * int(word[3])}.conv.{word[4]}"
        else:
            layer = dict(laterals="lateral_convs", smooths="fpn_convs")[word[1]]
            new = f"neck.{layer}.{word[2]}.conv.{word[3]}"
        out[new] = t
    return out


@pytest.mark.parametrize("name", ["lvt", "pvt_v2_b0"])
@pytest.mark.parametrize("prefix", ["", "student."])
def test_release_of_transkd(tmp_path, name, prefix):
    net = randomise(model.build(name, 20))
    state = {prefix + k: t for k, t in public(net.state_dict()).items()}
    torch.save(state, tmp_path / "x.pth")
    again, facts = model.load(tmp_path / "x.pth")
    x = torch.randn(1, 3, 64, 64)
    assert again.name == name and torch.equal(again(x).logits, net(x).logits)
    assert (facts["mean"], facts["resize"], facts["void"]) == ([0.0] * 3, 512, 19)


@pytest.mark.parametrize("name", ["lvt", "pvt_v2_b0", "pvt_v2_b1"])
def test_imagenet_weights(tmp_path, capsys, name):
    """Files of the public layout: all of the encoder comes in, the classifier is reported."""
    net, other = randomise(model.build(name, 3)), model.build(name, 3).eval()
    state = public(net.state_dict())
    state = {k: t for k, t in state.items() if k.startswith("backbone.")}
    if name != "lvt":
        state = {k.removeprefix("backbone."): t for k, t in state.items()}
        assert {"patch_embed1.proj.weight", "block1.0.attn.q.weight", "norm4.bias"} < state.keys()
    state |= {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
    torch.save(dict(state_dict=state), tmp_path / "x.pth")
    model.load_weights(other, tmp_path / "x.pth")
    said = capsys.readouterr().out
    n = len(net.encoder.state_dict())
    assert f"loaded {n} of {len(net.state_dict())} tensors" in said
    assert "2 not used: head.weight, head.bias" in said and "missing: head.l" in said
    x = torch.randn(1, 3, 64, 64)
    for got, want in zip(other(x, head=False).features, net(x, head=False).features):
        assert torch.equal(got, want)
    with pytest.raises(files.UserError, match="an encoder without a head that we know"):
        model.load(tmp_path / "x.pth")


# ------------------------------------------------------------------------------------------------
# the commands


@pytest.mark.parametrize("name", ["lvt", "pvt_v2_b0", "pvt_v2_b2"])
def test_costs(name):
    """Papers' count and executed count: they differ by the merged head, where there is one."""
    row = flops.measure_named(name, 20, (64, 128))
    assert row["params"] == COUNTS[name][0]
    assert (row["executed_gmacs"] < row["gmacs"]) == (name == "lvt")
    assert row["attention_gmacs"] > 0


def test_costs_of_a_pyramid_by_hand():
    row, n = flops.measure_named("pvt_v2_b0", 20, (64, 128)), [16 * 32, 8 * 16, 4 * 8, 2 * 4]
    dims = model.MODELS["pvt_v2_b0"][0]
    head = sum(c * 256 * k + 9 * 256 * 256 * k for c, k in zip(dims, n)) + 128 * 20 * n[0]
    head += 9 * 256 * 128 * sum(n)  # the first convs of the branches, and the others:
    head += 9 * 128 * 128 * (n[1] + (n[2] + n[1]))  # one of stage 3, two of stage 4
    with torch.device("meta"):
        net = model.build("pvt_v2_b0", 20).eval()
        encoder, _ = flops.count(lambda: net(torch.empty(1, 3, 64, 128), head=False))
    assert row["gmacs"] - encoder == pytest.approx(head / 1e9, rel=1e-6)


TINY = "--batch-size 2 --max-iters 1 --workers 0 --device cpu --eval-batch-size 3"


@pytest.mark.parametrize(
    "student, teacher, method",
    [
        ("lvt", "nano", "transkd-base+kd"),
        ("pvt_v2_b0", "lvt", "transkd-ea"),
        ("nano", "pvt_v2_b0", "transkd-gl"),
    ],
)
def test_train_and_score(tmp_path, capsys, student, teacher, method):
    root = write_folder(tmp_path / "data", train=4, val=2)
    words = f"--student {student} --teacher {teacher} --method {method} {TINY}".split()
    metrics = run(root, tmp_path / "out", *words)
    assert metrics["student"]["model"] == student and metrics["teacher"]["model"] == teacher
    if teacher == "lvt":
        assert "no ImageNet weights of a lvt" in capsys.readouterr().out
    argv = ["--ckpt", str(tmp_path / "out/student.pt"), "--device", "cpu"]
    argv += ["--dataset", "folder", "--data-dir", str(root), "--json"]
    capsys.readouterr()
    evaluation.main(evaluation.get_args(argv))
    scored = json.loads(capsys.readouterr().out)
    assert scored["miou"] == pytest.approx(metrics["student"]["miou"])


def test_teacher_from_imagenet_weights(tmp_path, monkeypatch):
    net, asked = model.build("pvt_v2_b0", 3), []
    torch.save(public(net.state_dict()), tmp_path / "x.pth")
    monkeypatch.setattr(
        weights, "fetch_from_hub", lambda name: asked.append(name) or tmp_path / "x.pth"
    )
    root = write_folder(tmp_path / "data", train=4, val=2)
    run(root, tmp_path / "out", "--teacher", "pvt_v2_b0", *TINY.split())
    assert asked == ["OpenGVLab/pvt_v2_b0"]
