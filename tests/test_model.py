"""The networks: sizes, shapes, an independent implementation's numbers, files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import files
import model
import nets

GOLDEN = json.loads((Path(__file__).parent / "golden_segformer.json").read_text())
PARAMS = dict(b0=3719284, b1=13682388, b2=27362004, b3=47237844, b4=64008404, b5=84608724)


def fill(net):
    """Weights from a formula that needs no random generator: the same in any framework."""
    with torch.no_grad():
        for name, t in sorted(net.state_dict().items()):
            if not t.is_floating_point():
                continue
            n = torch.arange(t.numel(), dtype=torch.float64)
            wave = torch.sin(n * 0.7 + len(name)).view(t.shape)
            fan_in = max(1, t[0].numel()) if t.ndim > 1 else 1
            scale, shift = (1.5 / fan_in**0.5, 0) if t.ndim > 1 else (0.1, 0)
            if "norm" in name and name.endswith("weight") or name.endswith("running_var"):
                shift = 1
            t.copy_(wave * scale + shift)
    return net


@pytest.mark.parametrize("name", PARAMS)
def test_parameter_counts(name):
    with torch.device("meta"):
        assert model.count_parameters(model.build(name, 20)) == PARAMS[name]


@pytest.mark.parametrize("name", ["nano", "b0", "b1", "lvt", "pvt_v2_b0", "pvt_v2_b1"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (97, 131)])
def test_shapes(name, size):
    net = model.build(name, 7).eval()
    with torch.no_grad():
        out = net(torch.randn(2, 3, *size))
    assert (net.name, net.num_classes, net.width) == (name, 7, model.MODELS[name][3])
    h, w = size
    quarter = (-(-h // 4), -(-w // 4))
    assert out.logits.shape == (2, 7, *quarter) and out.decoded.shape == (2, net.width, *quarter)
    for i, (f, e) in enumerate(zip(out.features, out.embeddings)):
        h, w = (-(-n // (4 if i == 0 else 2)) for n in (h, w))
        assert f.shape == (2, net.channels[i], h, w)
        assert e.shape == (2, h * w, net.channels[i])


@pytest.mark.parametrize("name", list(GOLDEN))
def test_equals_the_independent_implementation(name):
    """Logits and last feature map of Hugging Face's SegFormer with the same weights."""
    golden = GOLDEN[name]
    net = fill(model.build(name, 5)).eval()
    image = torch.sin(torch.arange(3 * 64 * 96, dtype=torch.float64) * 0.01).float()
    with torch.no_grad():
        out = net(image.view(1, 3, 64, 96))
    for got, want in ((out.logits, golden["logits"]), (out.features[3], golden["feature"])):
        got = got.flatten()[:: max(1, got.numel() // 40)][:40]
        assert torch.allclose(got, torch.tensor(want), atol=2e-5, rtol=2e-5)
        assert got.std() > 1e-3  # a constant would agree with anything


def test_too_small_an_image():
    with pytest.raises(files.UserError, match="31x64 pixels: nano needs 32x32"):
        model.build("nano", 2)(torch.zeros(1, 3, 31, 64))


def test_bfloat16_norms_have_the_gradients_of_float32():
    """Sums over many tokens, of which bfloat16 would lose most."""
    torch.manual_seed(0)
    norm, x = model.LayerNorm(32, eps=1e-6), torch.randn(4, 8192, 32)
    torch.nn.init.normal_(norm.weight)
    g = 1e-3 * torch.randn_like(x) + 1e-4
    want = torch.autograd.grad(norm(x.bfloat16().float()), norm.parameters(), g)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x.bfloat16())
    assert y.dtype == torch.bfloat16
    for a, b in zip(torch.autograd.grad(y, norm.parameters(), g.bfloat16()), want):
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("size", [(18, 26), (72, 104), (35, 50), (5, 7), (9, 13)])
def test_resizing_by_products(size):
    """Values and gradients; in bfloat16 with one rounding more, where the weights are exact."""
    x = torch.randn(2, 3, 9, 13, dtype=torch.float64, requires_grad=True)
    for weights in (None, torch.randn(size)):  # all alike, and not
        found = []
        for resize in (nets.resize, nets.resize_by_products):
            y = resize(x, size)
            grads = torch.autograd.grad((y if weights is None else y * weights).sum(), x)
            found.append((y, *grads))
        for want, got in zip(*found):
            assert torch.allclose(got, want, rtol=0, atol=1e-5)  # float32 weights
    if size in [(18, 26), (72, 104)]:
        want = nets.resize(x, size)
        got = nets.resize_by_products(x.bfloat16(), size)
        assert got.dtype == torch.bfloat16 and (got - want).norm() < 4e-3 * want.norm()


def test_merged_head_is_the_head_as_written():
    net = model.build("b0", 5).double().eval()
    features = net(torch.randn(2, 3, 65, 97, dtype=torch.float64)).features
    a, b = net.head.fuse_merged(features), net.head.fuse_as_written(features)
    assert torch.allclose(a, b, atol=1e-12)
    assert not torch.allclose(a, net.head.fuse_merged([f.flip(1) for f in features]), atol=1e-3)


def test_head_can_be_skipped():
    net = model.build("nano", 5).eval()
    net.head.forward = None  # calling it would raise
    out = net(torch.randn(1, 3, 64, 64), head=False)
    assert out.logits is None and len(out.features) == len(out.embeddings) == 4


def test_norm_eps_of_the_original():
    net = model.build("b0", 5)
    block = net.encoder.stages[0].blocks[0]
    assert block.norm1.eps == block.norm2.eps == net.encoder.stages[0].norm.eps == 1e-6
    assert net.encoder.stages[0].patch_embed.norm.eps == block.attn.norm.eps == 1e-5


def test_initialisation():
    torch.manual_seed(0)
    net = model.build("b1", 5)
    linear = net.encoder.stages[3].blocks[0].mlp.fc1
    assert abs(linear.weight.std().item() - 0.02) < 5e-4 and not linear.bias.any()
    conv = net.encoder.stages[3].patch_embed.proj  # fan out: 3 * 3 * 512
    assert abs(conv.weight.std().item() - (2 / (9 * 512)) ** 0.5) < 2e-4 and not conv.bias.any()
    depthwise = net.encoder.stages[3].blocks[0].mlp.dwconv  # fan out: 9, for it has as many groups
    assert abs(depthwise.weight.std().item() - (2 / 9) ** 0.5) < 2e-2


def test_drop_path_rates_rise_from_zero():
    net = model.build("b0", 5, drop_path=0.1)
    rates = [block.drop_path.p for stage in net.encoder.stages for block in stage.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.1, 8).tolist())


@pytest.mark.parametrize("dims", [1, 2])
def test_drop_keeps_the_mean_and_drops_whole_slices(dims):
    drop = model.Drop(0.25, dims)
    x = torch.ones(2000, 3, 4, 2)
    torch.manual_seed(0)
    y = drop(x)
    slices = y.flatten(dims)
    assert (slices == slices[..., :1]).all()
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(x), x)


def test_drop_of_a_shard_is_a_row_of_the_whole():
    drop, x = model.Drop(0.5, 1), torch.randn(8, 5)
    torch.manual_seed(3)
    whole = drop(x)
    parts = []
    for rank in range(2):
        drop.shard = (rank, 2)
        torch.manual_seed(3)
        parts.append(drop(x[4 * rank : 4 * rank + 4]))
    assert torch.equal(torch.cat(parts), whole)


def test_maps_and_tokens_are_views():
    x = torch.randn(2, 6 * 4, 8)
    m = model.to_map(x, 6, 4)
    assert m.data_ptr() == x.data_ptr() and m.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(m[1, 3, 2, 1], x[1, 2 * 4 + 1, 3])
    assert torch.equal(model.to_tokens(m), x) and model.to_tokens(m).is_contiguous()


def test_compiles_and_exports():
    net = model.build("nano", 5).eval()
    x = torch.randn(1, 3, 64, 64)
    want = net(x).logits
    assert torch.allclose(torch.export.export(net, (x,)).module()(x).logits, want, atol=1e-5)
    graph = torch.compile(net, backend="eager", fullgraph=True)  # no graph breaks
    assert torch.allclose(graph(x).logits, want, atol=1e-5)


def test_models_whose_tensors_do_not_tell_them_apart(tmp_path, monkeypatch):
    """The file says which it is and how many heads it has; an older one means the first model."""
    dims, _, depths, width = model.MODELS["nano"]
    mine = {"mine": (dims, (1, 1, 2, 2), depths, width), "twin": model.MODELS["nano"]}
    monkeypatch.setattr(model, "MODELS", model.MODELS | mine)
    monkeypatch.setattr(model, "NAMES", (*model.NAMES, *mine))
    for name in ("mine", "twin", "nano", "lvt", "pvt_v2_b0"):
        net = model.build(name, 3).eval()
        model.save(tmp_path / "net.pt", net)
        again, facts = model.load(tmp_path / "net.pt")
        assert again.name == name and "heads" not in facts
        x = torch.rand(1, 3, 64, 64)
        assert torch.equal(net(x).logits, again(x).logits)
    tree = torch.load(tmp_path / "net.pt", weights_only=True)
    assert tree.pop("heads") == model.MODELS["pvt_v2_b0"][1] and tree.pop("model")
    torch.save(tree, tmp_path / "net.pt")
    assert model.load(tmp_path / "net.pt")[0].name == "pvt_v2_b0"


def test_load_weights_says_what_it_did(tmp_path, capsys):
    source = model.build("nano", 5)
    model.save(tmp_path / "a.pt", source)
    net = model.build("nano", 9)
    head = net.head.classifier.weight.clone()
    model.load_weights(net, tmp_path / "a.pt")
    said = capsys.readouterr().out
    n = len(net.state_dict())
    assert f"loaded {n - 2} of {n} tensors" in said and "head.classifier.weight" in said
    assert torch.equal(net.head.classifier.weight, head)
    assert torch.equal(net.head.fuse.weight, source.head.fuse.weight)
    torch.save({"other": torch.zeros(3)}, tmp_path / "b.pt")
    with pytest.raises(
        files.UserError,
        match="no SegFormer and no ResNet in a layout that we know; its tensors: other",
    ):
        model.load_weights(net, tmp_path / "b.pt")


def test_weights_of_another_net_are_no_start(tmp_path, capsys):
    """A few tensors of it may fit, by chance: b2 has all of b1, and more blocks."""
    for name in ("b0", "b1", "b2"):
        torch.save(model.build(name, 5).state_dict(), tmp_path / f"{name}.pt")
    for name, other, words in (
        ("b0", "b1", "not the encoder of a b0, but b1 or pvt_v2_b1: 1"),
        (
            "b2",
            "b1",
            r"but b1 .*: \d+ of \d+ tensors missing or of another shape: encoder.stages.0",
        ),
        ("b1", "b2", r"but b2 .*: \d+ tensors too many: encoder.stages.0.blocks.2"),
    ):
        net = model.build(name, 5)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with pytest.raises(files.UserError, match=words):
            model.load_weights(net, tmp_path / f"{other}.pt")
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    capsys.readouterr()
    model.load_weights(model.build("b1", 5, head_width=64), tmp_path / "b1.pt")
    assert "its head has 256 channels, this one 64: not loaded" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_refused(tmp_path):
    """Scores of such a net would be those of its first class."""
    net = model.build("nano", 3)
    net.head.classifier.bias.data[1] = float("nan")
    model.save(tmp_path / "a.pt", net)
    for load in (model.load, lambda path: model.load_weights(model.build("nano", 3), path)):
        with pytest.raises(files.UserError, match="not all finite: head.classifier.bias"):
            load(tmp_path / "a.pt")


def test_a_mean_for_each_colour(tmp_path):
    for facts in (dict(mean=[0.5]), dict(std=[0.0] * 3), dict(mean=[float("inf")] * 3)):
        model.save(tmp_path / "a.pt", model.build("nano", 3), **facts)
        with pytest.raises(files.UserError, match="should be a number for each of RGB"):
            model.load(tmp_path / "a.pt")


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a checkpoint was run')",))


def test_no_code_in_a_file_is_run(tmp_path):
    torch.save({"state_dict": Bomb()}, tmp_path / "evil.pt")
    with pytest.raises(files.UserError, match="not a checkpoint of tensors"):
        model.load(tmp_path / "evil.pt")


def test_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    files.save_tensors(path, {"x": torch.ones(3)})
    with pytest.raises(ZeroDivisionError), files.atomic(path) as tmp:
        Path(tmp).write_text("half of it")
        raise ZeroDivisionError
    assert torch.equal(files.load_tensors(path)["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_attention_is_that_of_its_formula(dtype, tolerance):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8).to(dtype) for n in (50, 20, 20))
    w = (torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) / 8**0.5).softmax(dim=3)
    want = torch.einsum("bhij,bhjd->bhid", w, v.double())
    got = model.attend(q, k, v).double()
    assert (got - want).norm() < tolerance * want.norm()


@pytest.mark.parametrize("name", ["nano", "lvt", "pvt_v2_b0"])
def test_blocks_drop_samples_and_heads_channels(name):
    """And a rate of 0 is a rate."""
    net = model.build(name, 3, drop_path=0.2, dropout=0.3)
    drops = {k: m for k, m in net.named_modules() if isinstance(m, model.Drop)}
    encoder = [m for k, m in drops.items() if k.startswith("encoder.")]
    assert {m.dims for m in encoder} == {1} and max(m.p for m in encoder) == pytest.approx(0.2)
    assert [(m.dims, m.p) for k, m in drops.items() if k.startswith("head.")] == [(2, 0.3)]
    net = model.build(name, 3, drop_path=0.0, dropout=0.0)
    assert {m.p for m in net.modules() if isinstance(m, model.Drop)} == {0}
