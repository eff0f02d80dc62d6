"""Other people's checkpoints: every layout, in shards, from a hub that fails, and hostile ones."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import eval as evaluation
import model
import weights
from files import UserError

ROOT = Path(__file__).parent.parent


def a_net(name="nano", num_classes=5):
    """A net whose every tensor is random, norms and their statistics too."""
    torch.manual_seed(0)
    net = model.build(name, num_classes).eval()
    for name, t in net.state_dict().items():
        if t.is_floating_point() and (t.ndim == 1 or "norm" in name):
            t.uniform_(0.5, 1.5)
    return net


def nvlabs(state, prefix="backbone.", head="decode_head."):
    """Our state dict under the names of the original's files, where stages count from one."""
    out = {}
    for name, t in state.items():
        word = name.split(".")
        if word[0] == "encoder":
            stage, rest = int(word[2]) + 1, ".".join(word[4:])
            if word[3] == "patch_embed":
                new = f"{prefix}patch_embed{stage}.{rest}"
            elif word[3] == "norm":
                new = f"{prefix}norm{stage}.{rest}"
            else:
                rest = rest.replace("mlp.dwconv", "mlp.dwconv.dwconv")
                new = f"{prefix}block{stage}.{rest}"
        elif word[1] == "linears":
            new = f"{head}linear_c{int(word[2]) + 1}.proj.{word[3]}"
        else:
            place = dict(fuse="linear_fuse.conv", norm="linear_fuse.bn", classifier="linear_pred")
            new = f"{head}{place[word[1]]}.{word[2]}"
        out[new] = t
    return out


def mmseg(state):
    """The encoder as mmsegmentation's MixVisionTransformer has it."""
    out, blocks = {}, "backbone.layers.{}.1.{}.{}"
    for name, t in state.items():
        word = name.split(".")
        if word[0] != "encoder" or ".attn.q." in name:
            continue
        stage, rest = word[2], ".".join(word[5:])
        if word[3] == "patch_embed":
            rest = {"proj": "projection", "norm": "norm"}[word[4]] + "." + word[5]
            out[f"backbone.layers.{stage}.0.{rest}"] = t
        elif word[3] == "norm":
            out[f"backbone.layers.{stage}.2.{word[4]}"] = t
        elif ".attn.kv." in name:
            q = state[name.replace(".kv.", ".q.")]
            rest = f"attn.attn.in_proj_{word[-1]}"
            out[blocks.format(stage, word[4], rest)] = torch.cat([q, t])
        else:
            for ours, theirs in (
                ("attn.proj", "attn.attn.out_proj"),
                ("mlp.fc1", "ffn.layers.0"),
                ("mlp.dwconv", "ffn.layers.1"),
                ("mlp.fc2", "ffn.layers.4"),
            ):
                rest = rest.replace(ours, theirs)
            if rest.startswith("ffn") and t.ndim == 2:
                t = t[..., None, None]
            out[blocks.format(stage, word[4], rest)] = t
    return out


def test_nvlabs_checkpoint(tmp_path, capsys):
    net = a_net()
    state = nvlabs(net.state_dict()) | {"decode_head.conv_seg.weight": torch.ones(1)}
    meta = dict(CLASSES=list("abcde"), PALETTE=[[k, k, k] for k in range(5)])
    torch.save(dict(meta=meta, state_dict=state), tmp_path / "x.bin")
    again, facts = model.load(tmp_path / "x.bin")
    x = torch.randn(2, 3, 70, 52)
    assert torch.equal(again(x).logits, net(x).logits) and again.name == "nano"
    assert facts["classes"] == list("abcde") and facts["mean"] == list(model.IMAGENET_MEAN)
    assert facts["void"] is None and facts["resize"] is None
    other = model.build("nano", 5)
    model.load_weights(other, tmp_path / "x.bin")
    n = len(net.state_dict())
    said = capsys.readouterr().out
    assert f"loaded {n} of {n} tensors" in said and "1 not used: decode_head.conv_seg" in said


@pytest.mark.parametrize("name", ["b0", "b1", "b2"])
def test_imagenet_checkpoint(tmp_path, capsys, name):
    net, other = a_net(name, 3), model.build(name, 3)
    state = nvlabs(net.encoder.state_dict(prefix="encoder."), prefix="")
    width = net.channels[-1]
    state |= {"head.weight": torch.zeros(1000, width), "head.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "x.pth")
    model.load_weights(other, tmp_path / "x.pth")
    x = torch.randn(1, 3, 64, 64)
    for got, want in zip(other.eval()(x, head=False).features, net(x, head=False).features):
        assert torch.equal(got, want)
    said = capsys.readouterr().out
    assert "2 not used: head.weight, head.bias" in said and "missing: head.linears" in said
    with pytest.raises(UserError, match="an encoder without a head that we know"):
        model.load(tmp_path / "x.pth")


def test_another_networks_weights(tmp_path):
    """torchvision's MobileNets number their layers as other people number MiT's stages."""
    net = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="no SegFormer and no ResNet in a layout that we know"):
        model.load(tmp_path / "x.pth")


def test_mmsegmentation_checkpoint(tmp_path):
    net, other = a_net(), model.build("nano", 5).eval()
    state = mmseg(net.state_dict()) | {"decode_head.convs.0.conv.weight": torch.ones(1)}
    torch.save(dict(state_dict=state), tmp_path / "x.pth")
    model.load_weights(other, tmp_path / "x.pth")
    for name, t in net.encoder.state_dict().items():
        assert torch.equal(other.encoder.state_dict()[name], t), name


@pytest.mark.parametrize("prefix", ["student.", "module.student."])
def test_transkd_release(tmp_path, prefix):
    """20 outputs, the last void; adapters around, some of them called like the student's parts."""
    net = a_net("b0", 20)
    state = nvlabs(net.state_dict(), prefix, head=prefix)
    start = prefix.removesuffix("student.")
    adapters = {"skfs.0.conv1.0.weight": 9.0, "embed1_linearproject.weight": 9.0}
    adapters |= {"patch_embed1.proj.bias": 9.0, "conv1.weight": 9.0, "fuse_weights.0": 9.0}
    state |= {start + k: torch.full((64,), v) for k, v in adapters.items()}
    torch.save(state, tmp_path / "x.pth")
    again, facts = model.load(tmp_path / "x.pth")
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(again(x).logits, net(x).logits)
    assert (facts["mean"], facts["std"], facts["resize"]) == ([0.0] * 3, [1.0] * 3, 512)
    assert facts["void"] == 19
    other = model.build("b0", 20)
    model.load_weights(other, tmp_path / "x.pth")
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), net.parameters()))


def test_transkd_teacher_has_no_wrapper(tmp_path):
    torch.save(nvlabs(a_net("b0", 20).state_dict(), "module.", "module."), tmp_path / "x.pth")
    assert model.load(tmp_path / "x.pth")[1]["void"] == 19


def test_our_own_keeps_everything(tmp_path):
    net = model.build("nano", 4, head_width=48).eval()
    facts = dict(dataset="folder", classes=list("abcd"), palette=[[1, 2, 3]] * 4, dtype="bfloat16")
    model.save(tmp_path / "x.pt", net, **facts)
    again, read = model.load(tmp_path / "x.pt")
    x = torch.randn(1, 3, 40, 40)
    assert torch.equal(again(x).logits, net(x).logits) and again.head.fuse.out_channels == 48
    assert {k: read[k] for k in facts} == facts
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    assert torch.equal(model.load(tmp_path / "plain.pt")[0](x).logits, net(x).logits)
    compiled = {f"_orig_mod.{k}": v for k, v in net.state_dict().items()}
    torch.save({"model": compiled}, tmp_path / "compiled.pt")
    assert torch.equal(model.load(tmp_path / "compiled.pt")[0](x).logits, net(x).logits)


# ------------------------------------------------------------------------------------------------
# Hugging Face, live


def hugging_face(kind, name, num_labels=7):
    """One of transformers' models, of one of our sizes, with random weights everywhere."""
    transformers = pytest.importorskip("transformers")
    dims, heads, depths, width = model.MODELS[name]
    config = transformers.SegformerConfig(
        depths=depths,
        hidden_sizes=dims,
        num_attention_heads=heads,
        decoder_hidden_size=width,
        num_labels=num_labels,
        id2label={k: f"thing {k}" for k in range(num_labels)},
        label2id={f"thing {k}": k for k in range(num_labels)},
    )
    with torch.device("meta"):
        net = getattr(transformers, kind)(config)
    net = net.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for t in net.state_dict().values():
        if t.is_floating_point():
            t.uniform_(0.5, 1.5) if t.ndim == 1 else t.normal_(0, 0.02)
    return net


def close(ours, theirs):
    """The largest difference, against the largest value: their block norms use another eps."""
    return (ours - theirs).abs().max() <= 2e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", ["nano", "b0", "b1", "b2", "b3", "b4", "b5"])
@torch.no_grad()
def test_hugging_face_segmentation(tmp_path, name):
    theirs = hugging_face("SegformerForSemanticSegmentation", name)
    shards = {"b1": "20MB", "b2": "50MB"}.get(name, "5GB")
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (name in ("b1", "b2"))
    ours, facts = model.load(tmp_path)
    x = torch.randn(1, 3, 64, 96)
    assert ours.name == name and facts["classes"] == [f"thing {k}" for k in range(7)]
    assert close(ours(x).logits, theirs(x).logits)


@pytest.mark.parametrize("kind", ["SegformerModel", "SegformerForImageClassification"])
@pytest.mark.parametrize("form", ["folder", "model.safetensors", "pytorch_model.bin", "memory"])
@torch.no_grad()
def test_hugging_face_encoders(tmp_path, capsys, kind, form):
    theirs = hugging_face(kind, "nano")
    theirs.save_pretrained(tmp_path)
    source = tmp_path if form == "folder" else tmp_path / form
    if form == "pytorch_model.bin":  # as older versions wrote it
        from safetensors.torch import load_file

        torch.save(load_file(tmp_path / "model.safetensors"), source)
    if form == "memory":  # torch.save(net.state_dict()), whose names differ from the files'
        torch.save(theirs.state_dict(), source)
    net = model.build("nano", 5).eval()
    model.load_weights(net, source)
    x = torch.randn(1, 3, 64, 96)
    features = getattr(theirs, "segformer", theirs)(x, output_hidden_states=True).hidden_states
    for got, want in zip(net(x, head=False).features[:3], features[:3]):
        assert got.shape == want.shape
    assert close(net(x, head=False).features[3], features[-1])
    assert "missing: head.linears.0.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    "how",
    [
        dict(do_rescale=False, image_mean=[100.0, 110.0, 120.0], image_std=[50.0, 60.0, 70.0]),
        dict(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[0.5] * 3),
        dict(rescale_factor=1 / 127.5, do_normalize=False),
        dict(rescale_factor=1 / 200),
    ],
)
def test_images_are_prepared_as_by_their_processor(how, tmp_path):
    transformers = pytest.importorskip("transformers")
    hugging_face("SegformerForSemanticSegmentation", "nano").save_pretrained(tmp_path)
    processor = transformers.SegformerImageProcessor(do_resize=False, **how)
    processor.save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    want = processor(image, return_tensors="pt")["pixel_values"]
    got = evaluation.prepare(image, model.load(tmp_path)[1], None)
    assert torch.allclose(got, want, atol=1e-4)


def test_class_names_too_few_are_not_used(tmp_path, capsys):
    model.save(tmp_path / "a.pt", model.build("nano", 3), classes=["a", "b"], palette=[[1, 2, 3]])
    assert model.load(tmp_path / "a.pt")[1]["classes"] is None
    assert "2 class names for 3 outputs: not used" in capsys.readouterr().out


def test_preprocessor_and_config_are_obeyed(tmp_path):
    theirs = hugging_face("SegformerForSemanticSegmentation", "nano")
    theirs.save_pretrained(tmp_path)
    size = dict(height=640, width=512)
    config = dict(image_mean=[0.5] * 3, image_std=[0.25] * 3, size=size, do_resize=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    _, facts = model.load(tmp_path)
    assert (facts["mean"], facts["std"]) == ([0.5] * 3, [0.25] * 3)
    assert (facts["resize"], facts["short_side"]) == (None, 512)  # photos are resized, scores not
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(config | dict(do_normalize=False))
    )
    _, facts = model.load(tmp_path)
    assert (facts["mean"], facts["std"]) == ([0.0] * 3, [1.0] * 3)  # images in [0, 1]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | dict(num_attention_heads=[1] * 4)))
    with pytest.raises(UserError, match=r"heads \(1, 1, 1, 1\)"):
        model.load(tmp_path)
    with pytest.raises(UserError, match=r"\(1, 1, 1, 1\) attention heads, a nano has"):
        model.load_weights(model.build("nano", 5), tmp_path)
    for change in (dict(hidden_act="relu"), dict(strides=[4, 2, 2, 1])):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=f"{min(change)} .*: only .* is possible here"):
            model.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | dict(model_type="bert")))
    with pytest.raises(UserError, match="a bert, not a segformer"):
        model.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | dict(id2label={"1": "x"})))
    with pytest.raises(UserError, match="config files are not as they should be .KeyError: '0'"):
        model.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not a JSON file"):
        model.load(tmp_path)


# ------------------------------------------------------------------------------------------------
# hostile and damaged sources


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').write('run')",))


def hostile_files(folder):
    bomb = Bomb(folder / "was-run")
    torch.save({"state_dict": {"x": bomb}}, folder / "bomb.pth")
    (folder / "bomb.pkl").write_bytes(pickle.dumps({"x": bomb}))
    good = folder / "good.pth"
    torch.save(a_net().state_dict(), good)
    (folder / "cut.pth").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (folder / "empty.pth").write_bytes(b"")
    with zipfile.ZipFile(folder / "climbs.pth", "w") as z:
        z.writestr("../../climbed", b"out")
        z.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
    (folder / "zeros.safetensors").write_bytes(bytes(8) + b"{" + bytes(99))
    long = (1 << 60).to_bytes(8, "little") + b'{"a": 1}'
    (folder / "long.safetensors").write_bytes(long)
    return [p for p in sorted(folder.iterdir()) if p != good]


def test_hostile_files_are_refused_without_side_effect(tmp_path):
    pytest.importorskip("safetensors")
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    paths = hostile_files(folder)
    before = sorted(tmp_path.rglob("*"))
    for path in paths:
        for read in (model.load, lambda p: model.load_weights(model.build("nano", 5), p)):
            with pytest.raises(UserError) as e:
                read(path)
            assert path.name in str(e.value) and "\n" not in str(e.value), path
    assert sorted(tmp_path.rglob("*")) == before and len(paths) == 7


@pytest.mark.parametrize("safetensors", [True, False])
def test_of_two_files_that_which_can_be_read_is_taken(tmp_path, monkeypatch, safetensors):
    net = a_net()
    torch.save(nvlabs(net.state_dict()), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(weights, "installed", lambda package: safetensors)
    if safetensors:
        with pytest.raises(UserError, match="model.safetensors: not a checkpoint"):
            model.load(tmp_path)
    else:
        ours = model.load(tmp_path)[0].state_dict()
        assert all(x.equal(ours[name]) for name, x in net.state_dict().items())


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*a, **kw):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.pt").touch()
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UserError, match="x.pt: no permission to read it"):
        model.load(tmp_path / "x.pt")


def test_half_a_state_dict_is_no_model(tmp_path):
    state = nvlabs(a_net().state_dict())
    del state["backbone.block2.0.attn.kv.weight"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match="1 missing: encoder.stages.1.blocks.0.attn.kv.weight"):
        model.load(tmp_path / "x.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="neither model.safetensors nor pytorch_model.bin"):
        model.load(tmp_path / "folder")
    index = tmp_path / "folder" / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=dict(a="../../x.pth"))))
    with pytest.raises(UserError, match="names the shard ../../x.pth, which is no file beside it"):
        model.load(tmp_path / "folder")
    for source in ("no/such.pth", "no/such/folder", str(tmp_path / "nothing")):
        with pytest.raises(UserError, match="no such file"):
            model.load(source)


# ------------------------------------------------------------------------------------------------
# a hub on the loopback


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: HEAD and GET of /NAME/resolve/main/FILE."""

    protocol_version = "HTTP/1.1"

    def answer(self, body):
        content = self.server.files.get(self.path.rsplit("/", 1)[1])
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", "1" * 40)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        large = len(content) > 9999
        digest = hashlib.sha256(content).hexdigest() if large else "0" * 40
        self.send_response(200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(bytes(len(content)) if self.server.spoils and large else content)

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.spoils, server.files = False, {}
    torch.save(nvlabs(a_net().state_dict()), tmp_path / "w")
    server.files["pytorch_model.bin"] = (tmp_path / "w").read_bytes()
    names = {str(k): f"thing {k}" for k in range(5)}
    server.files["config.json"] = json.dumps(dict(id2label=names)).encode()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


FETCH = """
import sys; sys.path.insert(0, {root!r})
import files, model
def main(args):
    net, facts = model.load("somebody/some-model")
    print("RESULT", facts["classes"][-1], net.head.classifier.bias.sum().item())
files.cli(main, None)
"""


def fetch(home, port):
    """model.load of a hub's name, in a process of its own: the downloader reads the environment."""
    env = os.environ | dict(HF_HOME=str(home), HF_HUB_OFFLINE="0", OMP_NUM_THREADS="1")
    env["HF_ENDPOINT"] = f"http://127.0.0.1:{port}"
    code = FETCH.format(root=str(ROOT))
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_a_download_is_kept_unless_it_is_damaged(tmp_path, hub):
    hub.spoils = True
    done = fetch(tmp_path / "home", hub.server_port)
    assert done.returncode == 2 and "damaged (SHA-256" in done.stderr
    hub.spoils = False
    want = a_net().head.classifier.bias.sum().item()
    for _ in range(2):  # the second time without a network
        done = fetch(tmp_path / "home", hub.server_port)
        assert f"RESULT thing 4 {want}" in done.stdout, done.stderr
        hub.server_close()


def test_no_network_says_what_to_do_by_hand(tmp_path):
    pytest.importorskip("huggingface_hub")
    done = fetch(tmp_path / "home", 9)  # nobody listens there
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no file or folder here, and on the hub, somebody/some-model: no con" in done.stderr
    assert "no connection to http://127.0.0.1:9" in done.stderr
    assert "huggingface.co/somebody/some-model/tree/main and pass the folder" in done.stderr


def test_names_of_the_hub_are_told_from_paths(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(weights, "fetch_from_hub", lambda name: asked.append(name))
    weights.locate("nvidia/mit-b2")
    assert asked == ["nvidia/mit-b2"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for path in ("out/student", "nowhere/student.pt", "/nvidia/mit-b2", "a/b/c"):
        with pytest.raises(UserError, match="no such file"):
            weights.locate(path)
    assert len(asked) == 1
    (tmp_path / "nvidia").mkdir()  # with another net in it
    weights.locate("nvidia/mit-b2")
    assert asked == ["nvidia/mit-b2"] * 2
