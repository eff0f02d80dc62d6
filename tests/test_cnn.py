"""CNN teachers against torchvision's own, their weights in and out, and what they cannot do."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import write_folder
from test_train import logged
from torchvision.models import get_model

import cnn
import distill
import eval as evaluation
import flops
import methods
import model
import parallel
import train
import weights
from files import UserError
from nets import Drop

NAME, K = "deeplabv3_resnet50", 5
SMALL = "--student nano --crop-size 32 --batch-size 4 --max-iters 1".split()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def theirs(name=NAME, num_classes=K, **kw):
    return get_model(name, weights=None, weights_backbone=None, num_classes=num_classes, **kw)


@pytest.fixture(scope="module")
def net():
    """A net whose batch norms have seen something, so that a swapped one would show."""
    torch.manual_seed(0)
    net = model.build(NAME, K)
    with torch.no_grad():
        for _ in range(2):
            net(torch.randn(2, 3, 48, 64))
    return net.eval()


@pytest.fixture(scope="module")
def checkpoint(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("cnn") / "teacher.pt"
    model.save(path, net, classes=[f"c{k}" for k in range(K)], resize=64)
    return path


def argv(folder, out, *more):
    where = ["--dataset", "folder", "--data-dir", str(folder), "--out-dir", str(out)]
    fresh = [] if "--teacher-ckpt" in more else ["--teacher-init", "scratch"]
    return [*where, *SMALL, *fresh, *more]


def run(folder, out, *more):
    train.main(train.get_args(argv(folder, out, *more)))
    return json.loads((Path(out) / "metrics.json").read_text())


# ------------------------------------------------------------------------------------------------
# the module


@pytest.mark.parametrize("size", [(48, 64), (37, 51)])
def test_resized_logits_are_torchvisions(net, size):
    ours, images = net, torch.randn(2, 3, *size)
    reference = theirs().eval()
    reference.load_state_dict(ours.state_dict())
    with torch.no_grad():
        got, want = ours(images), reference(images)["out"]
    assert got.logits.shape == (2, K, -(-size[0] // 8), -(-size[1] // 8))
    assert torch.equal(model.resize(got.logits, size), want)
    other = torch.nn.functional.interpolate(got.logits, size, mode="bilinear", align_corners=True)
    assert not torch.allclose(other, want, rtol=1e-3)


@pytest.mark.parametrize("name", cnn.MODELS)
def test_shapes(name):
    with torch.device("meta"):
        net = model.build(name, 7).eval()
        out = net(torch.empty(1, 3, 65, 96))
        assert net(torch.empty(1, 3, 65, 96), head=False).logits is None
    sizes = [(17, 24), (9, 12), (9, 12), (9, 12)]
    assert [f.shape for f in out.features] == [(1, c, *s) for c, s in zip(net.channels, sizes)]
    assert (
        net.channels == (256, 512, 1024, 2048) and out.embeddings == () and not net.has_embeddings
    )
    assert net.width == (512 if "fcn" in name else 256)
    assert out.decoded.shape == (1, net.width, 9, 12) and out.logits.shape == (1, 7, 9, 12)
    assert {p: v.shape for p, v in net.state_dict().items()} == {
        p: v.shape for p, v in theirs(name, 7).state_dict().items()
    }


def test_decoded_is_what_the_classifier_gets_before_its_relu(net):
    out = net(torch.randn(1, 3, 40, 40))
    assert (out.decoded < 0).any()
    assert torch.allclose(net.classifier[-1](out.decoded.relu()), out.logits, atol=1e-5)
    assert not torch.allclose(net.classifier[-1](out.decoded), out.logits, atol=1e-2)


def test_features_are_the_layers(net):
    seen = {}
    hooks = [
        net.backbone[f"layer{k}"].register_forward_hook(
            lambda m, i, y, k=k: seen.update({k: y.clone()})
        )
        for k in (1, 2, 3, 4)
    ]
    out = net(torch.randn(1, 3, 40, 40), head=False)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(seen[k + 1], f) for k, f in enumerate(out.features))
    assert out.decoded is None


def test_its_dropout_is_one_that_processes_share():
    with torch.device("meta"):
        drops = [
            [(m.p, m.dims) for m in model.build(name, 2).modules() if isinstance(m, Drop)]
            for name in (NAME, "fcn_resnet50")
        ]
        assert not any(isinstance(m, torch.nn.Dropout) for m in model.build(NAME, 2).modules())
    assert drops == [[(0.5, 4)], [(0.1, 4)]]
    drop, x = Drop(0.25, 4), torch.ones(4, 5, 20, 30)
    torch.manual_seed(0)
    whole = drop(x)
    assert whole.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (whole == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    drop.shard = (1, 2)
    torch.manual_seed(0)
    assert torch.equal(drop(x[2:]), whole[2:])


def a_process(rank, port, net, images, want):
    """One of two: its half of the batch through the net in training gives its half of `want`."""
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    device = parallel.start("cpu")
    parallel.share_statistics(net, device)
    half = slice(2 * rank, 2 * rank + 2)
    with torch.no_grad():
        torch.manual_seed(1)
        got = net(images[half]).logits
        other = net(images[half]).logits  # with other coins
    assert (got - want[half]).abs().max() < 1e-3 * want.std()
    assert (other - want[half]).abs().max() > 0.1 * want.std()
    parallel.stop()


def test_two_processes_see_what_one_would():
    """In training, where batch norms and dropout look at the whole batch. (Not the gradients: those
    of a fresh ResNet change by a per cent with the last bits of its input.)"""
    torch.manual_seed(0)
    net, images = model.build(NAME, K).train(), torch.randn(4, 3, 40, 48)
    with torch.no_grad():
        torch.manual_seed(1)
        want = net(images).logits
    port = str(29100 + os.getpid() % 300)
    torch.multiprocessing.start_processes(
        a_process, (port, net, images, want), nprocs=2, start_method="fork"
    )


# ------------------------------------------------------------------------------------------------
# weights


def test_save_and_load(net, checkpoint):
    again, facts = model.load(checkpoint)
    assert (again.name, again.num_classes, again.training) == (NAME, K, False)
    assert facts["resize"] == 64 and facts["mean"] == list(model.IMAGENET_MEAN)
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(again(images).logits, net(images).logits)


@pytest.mark.parametrize("name", cnn.MODELS)
def test_recognise(name):
    with torch.device("meta"):
        state = theirs(name, 3).state_dict()
    assert model.recognise("x", weights.translate(state), {}) == (name, 3, None)


def test_torchvisions_segmenter_in_a_wrapper(tmp_path, capsys):
    """As its training scripts save it: under "model", from several GPUs, with an auxiliary head."""
    reference = theirs(num_classes=21, aux_loss=True).eval()
    state = {f"module.{k}": v for k, v in reference.state_dict().items()}
    torch.save(dict(model=state, epoch=3), tmp_path / "x.pth")
    again, facts = model.load(tmp_path / "x.pth")
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        got = model.resize(again(images).logits, (40, 40))
        assert torch.equal(got, reference(images)["out"])
    assert again.num_classes == 21 and facts["resize"] is None
    other = model.build(NAME, K)
    last = other.classifier[4].weight.clone()
    model.load_weights(other, tmp_path / "x.pth")
    said, n = capsys.readouterr().out, len(other.state_dict())
    assert f"loaded {n - 2} of {n} tensors" in said and "not used: aux_classifier.0" in said
    assert "warning: its head has 21 classes, this one 5: not loaded" in said
    assert torch.equal(other.classifier[4].weight, last)
    assert torch.equal(other.classifier[1].weight, again.classifier[1].weight)


def test_imagenet_weights(tmp_path, capsys):
    source = get_model("resnet50", weights=None)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    net = model.build(NAME, K)
    head = {k: v.clone() for k, v in net.classifier.state_dict().items()}
    model.load_weights(net, tmp_path / "x.pth")
    said, n = capsys.readouterr().out, len(net.state_dict())
    assert f"loaded {n - len(head)} of {n} tensors" in said
    assert "2 not used: fc.weight, fc.bias" in said
    state = source.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in net.backbone.state_dict().items())
    assert all(torch.equal(v, head[k]) for k, v in net.classifier.state_dict().items())
    with pytest.raises(UserError, match="a ResNet without the head of a DeepLabV3 or FCN"):
        model.load(tmp_path / "x.pth")
    with pytest.raises(UserError, match="not the encoder of a nano, but a ResNet: 100 of 100"):
        model.load_weights(model.build("nano", 3), tmp_path / "x.pth")


def test_another_resnet_is_refused(tmp_path):
    torch.save(get_model("resnet18", weights=None).state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="a ResNet of another depth"):
        model.load(tmp_path / "x.pth")


def test_half_a_checkpoint_is_damaged(net, tmp_path):
    state = {k: v for k, v in net.state_dict().items() if "layer4.2" not in k}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match="missing: backbone.layer4.2.conv1.weight"):
        model.load(tmp_path / "x.pth")


def test_weights_by_torchvisions_names(tmp_path, monkeypatch):
    """What is in torch.hub's cache is checked and used; without a network, what to do by hand."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "reachable", lambda url: False)
    place = tmp_path / "hub/checkpoints/resnet50-0676ba61.pth"
    with pytest.raises(UserError) as e:
        weights.read("torchvision/resnet50")
    url = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
    assert url in str(e.value) and str(place) in str(e.value) and "\n" not in str(e.value)
    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")
    with pytest.raises(UserError, match="its sha256 is .*, expected 0676ba61; remove it"):
        weights.read("torchvision/resnet50")
    with pytest.raises(UserError, match="torchvision has no model of this name"):
        weights.read("torchvision/resnet5")
    start = hashlib.sha256(b"something else").hexdigest()[:8]
    place = place.rename(place.with_name(f"x-{start}.pth"))
    assert weights.cached(f"https://nowhere/x-{start}.pth", place.parent) == place


def test_facts_of_torchvisions_segmenters(checkpoint, tmp_path, monkeypatch):
    torch.save(torch.load(checkpoint, weights_only=True)["state_dict"], tmp_path / "x.pth")
    monkeypatch.setattr(weights, "fetch_torchvision", lambda name: tmp_path / "x.pth")
    assert model.load(f"torchvision/{NAME}")[1]["resize"] == 520
    assert model.load(tmp_path / "x.pth")[1]["resize"] is None


# ------------------------------------------------------------------------------------------------
# as a teacher


def test_csf_alone_learns_from_a_cnn():
    """Its maps on the student's grids: 2x2 and 4x4 pixels of stage 3 and 4 are averaged."""
    torch.manual_seed(0)
    student = model.build("nano", K)
    channels = (8, 12, 16, 20)
    maps = tuple(torch.randn(2, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 8, 8)))
    seen = model.Output(None, maps, ())
    method = methods.build_method(
        "transkd-base", student.channels, channels, has_embeddings=False, embed="none"
    )
    out = student(torch.randn(2, 3, 64, 96))
    fused = method.csf(out.features)
    want = 0
    for f, t, r in zip(fused, maps, (1, 1, 2, 4)):
        B, C, H, W = t.shape
        want += distill.hcl(f, t.view(B, C, H // r, r, W // r, r).mean((3, 5))).item()
    (term,) = method(out, seen, None, None).values()
    assert term.item() == pytest.approx(want, rel=1e-5)
    picked = sum(
        distill.hcl(f, t[:, :, ::r, ::r]).item() for f, t, r in zip(fused, maps, (1, 1, 2, 4))
    )
    assert abs(picked - want) > 0.01 * want
    for method in ("transkd-base", "transkd-gl", "transkd-ea"):
        with pytest.raises(UserError, match="--method transkd-base --embed none") as e:
            methods.build_method(method, student.channels, channels, has_embeddings=False)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("method", ["transkd-base", "c2vkd+kd"])
def test_a_run_with_a_teacher_that_is_there(tmp_path, checkpoint, method, capsys):
    folder = write_folder(tmp_path / "data", classes=K)
    more = ["--embed", "none"] if method == "transkd-base" else []
    metrics = run(
        folder, tmp_path / "out", "--teacher-ckpt", str(checkpoint), "--method", method, *more
    )
    assert metrics["teacher"]["model"] == NAME and metrics["teacher"]["gmacs"] > 0.5
    said = capsys.readouterr().out
    if method == "transkd-base":
        with pytest.raises(UserError, match="--embed none"):
            run(folder, tmp_path / "b", "--teacher-ckpt", str(checkpoint), "--alone")
        assert not (tmp_path / "b/alone.pt").exists()
    else:
        assert said.count("c2vkd: without its linguistic term") == 1
        step = logged(tmp_path / "out")[1]
        assert "ce" not in step and "c2vkd/pdd" in step


def test_the_teachers_own_training(folder, tmp_path):
    metrics = run(folder, tmp_path / "out", "--teacher", "fcn_resnet50", "--method", "kd")
    assert metrics["teacher"]["model"] == "fcn_resnet50" and metrics["teacher"]["steps"] == 1
    net, facts = model.load(tmp_path / "out/teacher.pt")
    assert net.num_classes == 3 and facts["classes"] == ["thing 0", "thing 1", "thing 2"]
    images = torch.randn(1, 3, 40, 48)
    assert evaluation.predict(net, images, (40, 48), flip=True).shape == (1, 3, 40, 48)
    (tmp_path / "out/teacher.pt").unlink()


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "--method transkd-base --embed none"),
        (["--method", "kd", "--teacher-batch-size", "1"], "cannot learn from one image at a time"),
        (
            ["--method", "kd", "--accumulate", "4", "--crop-size", "64"],
            "cannot learn from one image at a time",
        ),
        (["--student", NAME], f"unknown model '{NAME}': choose one of nano, b0"),
        (["--teacher", "resnet50"], "b5, deeplabv3_resnet50"),
        (["--embed", "none", "--feature-loss", "none"], "nothing for it to act on"),
    ],
)
def test_mistakes_show_before_any_training(folder, tmp_path, more, message):
    with pytest.raises(UserError) as e:
        run(folder, tmp_path / "out", "--teacher", NAME, *more)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_imagenet_weights_by_default(folder, tmp_path, capsys, monkeypatch):
    asked = []

    def no_network(name):
        asked.append(name)
        raise UserError(f"https://{name}: no connection")

    monkeypatch.setattr(weights, "fetch_torchvision", no_network)
    args = train.get_args(argv(folder, tmp_path / "out", "--teacher", NAME, "--method", "kd"))
    train.resolve(args)
    with torch.device("meta"):
        net = model.build(NAME, 3)
    assert train.start_from(train.open_run(args), "teacher", net, "auto") == "scratch"
    assert asked == ["resnet50"] and "no connection\n!!! So the teacher" in capsys.readouterr().out


def test_costs(capsys):
    """Of 21 classes at 520x520 torchvision says 42,004,074 parameters and 178.722 GMACs, with the
    auxiliary head: 3x3 x 1024 x 256, a batch norm, and 256 x 21, on a map of 65x65."""
    row = flops.measure_named(NAME, 21, (520, 520))
    head = 9 * 1024 * 256 + 256 * 21
    assert row["params"] == 42004074 - head - 2 * 256 - 21
    assert (
        row["gmacs"] == row["executed_gmacs"] == pytest.approx(178.722 - head * 65**2 / 1e9, 1e-5)
    )
    words = "--model nano --teacher deeplabv3_resnet50 --method c2vkd --size 64x64 --json".split()
    flops.main(flops.get_args(words))
    plain, wrapped = json.loads(capsys.readouterr().out)
    assert wrapped["params"] - plain["params"] == 128 * 2048
