"""Exports against the programs that open them, and what a failed one leaves behind."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import picture
from PIL import Image
from test_model import fill
from test_weights import nvlabs

import catalog
import eval as evaluation
import export
import files
import model
from model import IMAGENET_MEAN, IMAGENET_STD

FACTS = dict(
    classes=[f"thing {k}" for k in range(5)],
    palette=[[10 * k, 0, 255] for k in range(5)],
    mean=list(IMAGENET_MEAN),
    std=list(IMAGENET_STD),
    short_side=None,
    resize=None,
)
SIZES = ((2, 96, 160), (1, 97, 131), (3, 64, 70))  # only the first is traced


def checkpoint(folder, name="nano", how=fill, **facts):
    """A file whose every tensor matters, the batch norm's included."""
    model.save(folder / f"{name}.pt", how(model.build(name, 5)), **FACTS | facts)
    return folder / f"{name}.pt"


def stir(net):
    """As it starts, but no bias is 0 and no norm leaves a channel as it is; `fill` makes LVT one
    that enlarges rounding errors a hundred times."""
    for t in net.state_dict().values():
        if t.ndim == 1:
            t += 0.1 * torch.rand_like(t)
    net.head.classifier.weight.data *= 20
    return net


def run(*argv):
    export.main(export.get_args([*map(str, argv)]))


@torch.no_grad()
def assert_same_logits(path, other, sizes=SIZES):
    net, _ = model.load(path)
    for B, H, W in sizes:
        x = torch.randn(B, 3, H, W)
        want, got = net(x).logits, other(x)
        assert got.shape == want.shape
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


@torch.no_grad()
def assert_same_masks(path, other):
    """Against the way of eval.py, photo by photo."""
    net, facts = model.load(path)
    for B, H, W in SIZES:
        photos = torch.randint(256, (B, H, W, 3), dtype=torch.uint8)
        x = torch.cat([evaluation.prepare(photo.numpy(), facts) for photo in photos])
        want, got = evaluation.predict_ids(net, x, (H, W)), other(photos)
        want[want >= len(facts["classes"])] = 255
        assert got.dtype == torch.uint8 and got.shape == want.shape
        assert len(want.unique()) > 1 and (got != want).double().mean() < 1e-4


# ------------------------------------------------------------------------------------------------
# Hugging Face


def hub_names(depths):
    """The tensors of a SegFormer on the hub, written down apart from export.HF_NAMES."""
    head, encoder = "decode_head", "segformer.encoder"
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{head}.linear_fuse.weight"} | {f"{head}.batch_norm.{word}" for word in norm}
    both = [f"{head}.classifier"]
    for i, depth in enumerate(depths):
        both += [f"{encoder}.patch_embeddings.{i}.{word}" for word in ("proj", "layer_norm")]
        both += [f"{encoder}.layer_norm.{i}", f"{head}.linear_c.{i}.proj"]
        words = ["layer_norm_1", "layer_norm_2", "mlp.dense1", "mlp.dense2", "mlp.dwconv.dwconv"]
        words += [f"attention.self.{word}" for word in ("query", "key", "value")]
        words += ["attention.output.dense"]
        words += ["attention.self.sr", "attention.self.layer_norm"] if i < 3 else []
        both += [f"{encoder}.block.{i}.{j}.{word}" for j in range(depth) for word in words]
    return names | {f"{name}.{word}" for name in both for word in ("weight", "bias")}


def test_hf_weights_have_the_hubs_names_and_our_bits(tmp_path, monkeypatch, capsys):
    load_file = pytest.importorskip("safetensors.torch").load_file
    monkeypatch.setattr(files, "installed", lambda name: name != "transformers")
    run("--ckpt", checkpoint(tmp_path), "--to", "hf", "--out-dir", tmp_path / "hf")
    assert "pip install transformers" in capsys.readouterr().out
    theirs = load_file(tmp_path / "hf/model.safetensors")
    ours = model.load(tmp_path / "nano.pt")[0].state_dict()
    assert theirs.keys() == hub_names((1, 1, 1, 1))
    mapped = export.hf_state(ours)
    assert all(torch.equal(theirs[name], mapped[name]) for name in mapped)
    kv = ours["encoder.stages.2.blocks.0.attn.kv.weight"]
    pair = [
        theirs[f"segformer.encoder.block.2.0.attention.self.{x}.weight"] for x in ("key", "value")
    ]
    assert torch.equal(torch.cat(pair), kv)
    assert torch.equal(theirs["decode_head.linear_fuse.weight"], ours["head.fuse.weight"])


@pytest.mark.parametrize("name", ["nano", "b0"])
def test_hf_in_transformers(name, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    path = checkpoint(tmp_path, name)
    run("--ckpt", path, "--to", "hf", "--out-dir", tmp_path / "hf")
    said = capsys.readouterr().out
    assert "largest difference" in said and "MB" in said and "from_pretrained" in said
    theirs, info = transformers.SegformerForSemanticSegmentation.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values())
    assert_same_logits(path, lambda x: theirs(x).logits)
    config = theirs.config
    assert config.id2label == dict(enumerate(FACTS["classes"]))
    assert config.label2id["thing 3"] == 3 and config.semantic_loss_ignore_index == 255


@pytest.mark.parametrize("layout", ["ours", "ours, any size", "NVlabs", "TransKD"])
def test_round_trip(layout, tmp_path):
    """From any layout to a Hugging Face folder and back: the same bits, and the facts."""
    pytest.importorskip("safetensors")
    facts = dict(dataset="folder", short_side=64, dtype="bfloat16", void=None)
    facts["resize"] = 96 if layout == "ours" else None
    path = checkpoint(tmp_path, **facts)
    if "ours" not in layout:
        net = fill(model.build("nano", 20))
        prefix, head = dict(NVlabs=("backbone.", "decode_head."), TransKD=("student.",) * 2)[layout]
        torch.save(nvlabs(net.state_dict(), prefix, head), path)
    net, facts = model.load(path)
    run("--ckpt", path, "--to", "hf", "--out-dir", tmp_path / "hf")
    again, read = model.load(tmp_path / "hf")
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    filled = catalog.complete(facts, net.num_classes)
    assert read == filled and (layout != "TransKD" or (read["void"], read["mean"]) == (19, [0] * 3))
    run("--ckpt", tmp_path / "hf", "--to", "hf", "--out-dir", tmp_path / "again")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("classes", [list("vwxyz"), list("abc")])
def test_a_folder_that_transformers_trained_further(classes, tmp_path):
    """Its own fields count then, not what export.py wrote beside them."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    run("--ckpt", checkpoint(tmp_path), "--to", "hf", "--out-dir", tmp_path / "hf")
    where = dict(pretrained_model_name_or_path=tmp_path / "hf")
    theirs = transformers.SegformerForSemanticSegmentation.from_pretrained(
        **where, id2label=dict(enumerate(classes)), ignore_mismatched_sizes=True
    )
    theirs.save_pretrained(tmp_path / "more")
    processor = transformers.SegformerImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3)
    processor.save_pretrained(tmp_path / "more")
    net, facts = model.load(tmp_path / "more")
    assert net.num_classes == len(classes) and facts["classes"] == classes
    assert (facts["mean"], facts["std"]) == ([0.5] * 3, [0.25] * 3)
    run("--ckpt", tmp_path / "more", "--to", "hf", "--out-dir", tmp_path / "again")
    assert model.load(tmp_path / "again")[1]["classes"] == classes


@pytest.mark.parametrize("side, tolerance", [("", 1e-5), ("resize", 0.02), ("short_side", 0.02)])
def test_hf_processor_prepares_images_as_we_do(side, tolerance, tmp_path):
    """To 0.02 if it resizes: one of 255 steps, for torchvision rounds otherwise than PIL."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    path, resize = checkpoint(tmp_path, **({side: 32} if side else {})), 32 if side else None
    run("--ckpt", path, "--to", "hf", "--out-dir", tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    image, label = picture(0, height=64, width=81)  # at 32 40.5 wide, which rounds down
    label[:2] = 255
    got = processor(Image.fromarray(image), Image.fromarray(label), return_tensors="pt")
    want = evaluation.prepare(image, FACTS, resize)
    assert got["pixel_values"].shape == want.shape == (1, 3, *((32, 40) if resize else (64, 81)))
    assert (got["pixel_values"] - want).abs().max() < tolerance
    assert got["labels"].unique().tolist() == [0, 1, 2, 255]


# ------------------------------------------------------------------------------------------------
# graphs


@pytest.mark.parametrize("name", ["nano", "lvt", "pvt_v2_b0"])
def test_deployed_is_the_same_function(name):
    net = fill(model.build(name, 5)).double().eval()
    x = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    assert torch.allclose(export.Deployed(net)(x), net(x).logits, atol=1e-12)


@pytest.fixture
def onnxruntime():
    if torch.__version__ < (2, 7):
        pytest.skip("torch 2.7 is needed")
    return [pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime")][-1]


def open_onnx(onnxruntime, path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def test_onnx(onnxruntime, tmp_path, capsys):
    path, out = checkpoint(tmp_path, resize=64), tmp_path / "a" / "b"
    run("--ckpt", path, "--to", "onnx", "--out-dir", out)
    said = capsys.readouterr().out
    assert "largest difference" in said and "resize photos to a shorter side of 64" in said
    assert [p.name for p in out.iterdir()] == ["model.onnx"]
    session, other = open_onnx(onnxruntime, out / "model.onnx")
    assert_same_logits(path, other, (*SIZES, (2, 32, 33)))  # smaller than promised even
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert images.shape == ["batch", 3, "height", "width"] and logits.name == "logits"
    about = session.get_modelmeta().custom_metadata_map
    want = {key: FACTS[key] for key in ("classes", "palette", "mean", "std")}
    assert {key: json.loads(value) for key, value in about.items()} == want | dict(short_side=64)
    assert str(export.__file__).encode() not in (out / "model.onnx").read_bytes()


def test_onnx_mask(onnxruntime, tmp_path, capsys):
    path = checkpoint(tmp_path)
    run("--ckpt", path, "--to", "onnx", "--mask", "--out-dir", tmp_path / "o")
    said = capsys.readouterr().out
    assert "of the pixels" in said and "open it with" in said
    session, other = open_onnx(onnxruntime, tmp_path / "o" / "model.onnx")
    assert session.get_inputs()[0].type == "tensor(uint8)"
    assert_same_masks(path, other)


@pytest.mark.parametrize("mask", [False, True])
def test_pt2(mask, tmp_path, capsys):
    """With --mask of a net whose last output is no class, as in TransKD's release."""
    own = FACTS | (dict(classes=FACTS["classes"][:4], palette=FACTS["palette"][:4]) if mask else {})
    path = checkpoint(tmp_path, void=4 if mask else None, **own)
    flags = ["--mask"] if mask else []
    run("--ckpt", path, "--to", "pt2", "--out-dir", tmp_path / "o", *flags)
    assert "largest difference" in capsys.readouterr().out
    about = dict(classes="", palette="", mean="", std="")
    program = torch.export.load(tmp_path / "o" / "model.pt2", extra_files=about)
    assert {key: json.loads(about[key]) for key in about} == {key: own[key] for key in about}
    (assert_same_masks if mask else assert_same_logits)(path, program.module())
    assert str(export.__file__).encode() not in (tmp_path / "o" / "model.pt2").read_bytes()


def test_lvt(onnxruntime, tmp_path, monkeypatch):
    dims, heads, _, width = model.MODELS["lvt"]
    one = (dims, heads, (1, 1, 1, 1), width)  # block a stage: the second is traced as the first
    monkeypatch.setitem(model.MODELS, "lvt", one)
    path = checkpoint(tmp_path, "lvt", stir)
    run("--ckpt", path, "--to", "onnx", "--out-dir", tmp_path / "o")
    assert_same_logits(path, open_onnx(onnxruntime, tmp_path / "o" / "model.onnx")[1])


def test_pvt(tmp_path):
    path = checkpoint(tmp_path, "pvt_v2_b0", stir)
    run("--ckpt", path, "--to", "pt2", "--mask", "--out-dir", tmp_path / "o")
    assert_same_masks(path, torch.export.load(tmp_path / "o" / "model.pt2").module())


# ------------------------------------------------------------------------------------------------
# what goes wrong


@pytest.mark.parametrize(
    "form, side, said",
    [
        ("hf", 32, "its image processor resizes photos to a shorter side of 32 pixels"),
        ("pt2", 64, "resize photos to a shorter side of 64 pixels"),
        ("pt2", 63, "!!! A pt2 file takes no image below 64 pixels: use onnx"),
    ],
)
def test_what_to_do_with_photos(form, side, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(export.FORMS, form, (lambda *a: "the same", [], "it"))
    run("--ckpt", checkpoint(tmp_path, resize=side), "--to", form, "--out-dir", tmp_path / "o")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(said) for line in lines)
    assert any("!!!" in line for line in lines) == ("!!!" in said)


def test_other_files_stay(tmp_path):
    pytest.importorskip("safetensors")
    out = tmp_path / "hf"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "config.json").write_text("old")
    run("--ckpt", checkpoint(tmp_path), "--to", "hf", "--out-dir", out)
    names = ["config.json", "model.safetensors", "notes.txt", "preprocessor_config.json"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "config.json").read_text())["model_type"] == "segformer"


TERMINATED = """
import sys, time
sys.path.insert(0, {root!r})
import export, files, pathlib
def main(args):
    with export.staging(pathlib.Path({out!r})) as tmp, files.atomic(tmp / "a") as half:
        open(half, "w").close()
        print(flush=True)
        time.sleep(60)
files.cli(main, None)
"""


def test_sigterm_leaves_nothing(tmp_path):
    code = TERMINATED.format(root=str(Path(export.__file__).parent), out=str(tmp_path / "out"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert list(tmp_path.rglob("a.tmp*"))
        child.terminate()
    assert child.returncode == 128 + signal.SIGTERM and not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [False, True])
def test_a_failed_comparison_leaves_nothing(there, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    path, out = checkpoint(tmp_path), tmp_path / "new" / "hf"
    if there:
        out.mkdir(parents=True)
        (out / "config.json").write_text("old")
    monkeypatch.setattr(export, "HF_TOLERANCE", 1e-9)
    with pytest.raises(files.UserError, match="discarded: it differs by"):
        run("--ckpt", path, "--to", "hf", "--out-dir", out)
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))
    assert left == (["nano.pt", "new", "new/hf", "new/hf/config.json"] if there else ["nano.pt"])
    assert not there or (out / "config.json").read_text() == "old"


@pytest.mark.parametrize("mean_std", [None, (FACTS["mean"], FACTS["std"])])
def test_compare_finds_what_differs(mean_std):
    net = fill(model.build("nano", 5)).eval()
    good = export.Deployed(net, mean_std)
    assert "largest difference" in export.compare(net, good, 1e-4, mean_std)
    for factor in (1.01, float("nan")):
        bad = export.Deployed(net, mean_std)
        bad.head.weights[2].data *= factor
        for sizes in ((1, 2), (1,), (2,)):  # at both, or only at one

            def other(x, bad=bad, sizes=sizes):
                return (bad if len(x) in sizes else good)(x)

            with pytest.raises(files.UserError, match="discarded: it differs"):
                export.compare(net, other, 1e-4, mean_std)
    with pytest.raises(files.UserError, match="discarded: it gives"):
        export.compare(net, lambda x: good(x)[:, 1:], 1e-4, mean_std)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--ckpt", "nowhere.pt", "--to", "pt2"], "nowhere.pt: no such file"),
        (["--ckpt", "text.pt", "--to", "pt2"], "not a checkpoint"),
        (["--ckpt", "nano.pt", "--to", "pt2", "--out-dir", "text.pt"], "a file, not a folder"),
        (["--ckpt", "nano.pt", "--to", "hf", "--mask"], "--mask is for onnx and pt2"),
    ],
)
def test_mistakes(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path)
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(files.UserError, match=message):
        run("--out-dir", "out", *argv)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nano.pt", "text.pt"]


@pytest.mark.parametrize(
    "name, form, message",
    [
        ("lvt", "hf", "a lvt, which transformers lacks: use onnx or pt2"),
        ("pvt_v2_b0", "hf", "a pvt_v2_b0, which transformers lacks"),
        ("fcn_resnet50", "pt2", "a fcn_resnet50; CNNs teach here"),
    ],
)
def test_what_is_not_exported(name, form, message, tmp_path):
    pytest.importorskip("safetensors")
    model.save(tmp_path / "x.pt", model.build(name, 5))
    with pytest.raises(files.UserError, match=f"x.pt: {message}"):
        run("--ckpt", tmp_path / "x.pt", "--to", form, "--out-dir", tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("form, packages", [("hf", "safetensors"), ("onnx", "onnx onnxscript")])
def test_missing_packages_are_named(form, packages, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.7.0"))
    monkeypatch.setattr(files, "installed", lambda name: name not in packages.split())
    with pytest.raises(files.UserError, match=f"--to {form} needs: pip install {packages}$"):
        run("--ckpt", checkpoint(tmp_path), "--to", form, "--out-dir", tmp_path / "o")


def test_onnx_and_torch_2_6(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.6.0+cpu"))
    with pytest.raises(files.UserError, match="--to onnx needs torch 2.7"):
        run("--ckpt", checkpoint(tmp_path), "--to", "onnx", "--out-dir", "o")
