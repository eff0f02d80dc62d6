"""Pre-training: photos and their windows, classifiers, what teaches them, runs, mistakes."""

import dataclasses
import functools
import json
import math
import os
import pickle
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_photos
from PIL import Image
from test_train import command as train_command
from test_train import crash, logged, same, weights, with_and_without_cache, write_folder
from test_train import run as train
from torchvision.models import VisionTransformer
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import augment
import classifiers
import data
import files
import loop
import model
import parallel
import photos
import pretrain
import settings
from files import UserError
from nets import Output
from step import Learner, learning_rate
from tat import WholeTaT

SMALL = "--model nano --size 32 --batch-size 4 --max-iters 6 --lr 1e-3 --log-every 0".split()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture(scope="module")
def teacher(tree, tmp_path_factory):
    """A trained nano, as --teacher takes it."""
    out = tmp_path_factory.mktemp("teacher")
    run(tree, out / "nano", "--max-iters", "30", "--lr", "3e-3")
    return str(out / "nano/encoder.pt")


def words(tree, out, *more):
    return ["--data-dir", str(tree), "--out-dir", str(out), *SMALL, *more]


def run(tree, out, *more):
    pretrain.main(pretrain.get_args(words(tree, out, *more)))
    return json.loads((Path(out) / "metrics.json").read_text())


command = functools.partial(train_command, script="pretrain.py")


def encoders(*outs):
    return [weights(out, "encoder.pt") for out in outs]


def steps(out):
    """The lines about steps, without how fast they were."""
    return [{k: v for k, v in r.items() if k != "img_s"} for r in logged(out) if "lr" in r]


# ------------------------------------------------------------------------------------------------
# photos


def some_photos(tree, store=1000):
    return photos.find(tree, "train", store)


def batch(split, crops, n=4, step=0, **kw):
    return augment.Batches(split, n, 0, crops, make=photos.host_batch, **kw)[step]


def test_windows_are_torchvisions_resized_crops(tree, monkeypatch):
    """The window of each photo, by torchvision: same box, same pixels, flipped or not."""
    boxes, split = [], some_photos(tree)
    draw = photos.window
    monkeypatch.setattr(photos, "window", lambda *a: boxes.append(draw(*a)) or boxes[-1])
    flipped, colours = 0, []
    for step in range(6):
        colours += batch(split, photos.Crops(48), step=step)["colour"].tolist()
        boxes.clear()
        got = batch(split, photos.Crops(48, colour=0), step=step)
        images = augment.resample(got)
        order = augment.sample_indices(step, 4, len(split), 0)
        for image, (top, left, h, w), i in zip(images, boxes, order):
            photo = torch.from_numpy(split.image(i).copy()).permute(2, 0, 1).float() / 255
            want = tv.resized_crop(photo, top, left, h, w, [48, 48], antialias=False)
            errors = [(image - x).abs().max() for x in (want, want.flip(2))]
            flipped += int(errors[1] < errors[0])
            assert min(errors) < 1e-4
        assert got["label"].tolist() == [split.labels[i] for i in order]
    assert 4 < flipped < 20
    assert len({str(c) for c in colours}) == 24  # no two draw the same


def test_windows_are_drawn_as_torchvision_draws_them():
    """Mean and spread of area and aspect over many draws; the same middle where none fits."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    photo = torch.zeros(1, 150, 200)
    for scale in ((0.08, 1.0), (0.3, 0.5)):
        crop = v2.RandomResizedCrop(8, scale=scale)
        draws = [crop.make_params([photo]) for _ in range(4000)]
        theirs = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in draws])
        ours = np.array([photos.window(rng, 150, 200, scale) for _ in range(4000)])
        assert (ours[:, 0] + ours[:, 2] <= 150).all() and (ours[:, 1] + ours[:, 3] <= 200).all()
        assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 2.5
        assert np.abs(ours.std(0) - theirs.std(0)).max() < 2.5
    for h, w in ((10, 100), (100, 10)):
        theirs = v2.RandomResizedCrop(8, scale=(0.9, 1)).make_params([torch.zeros(1, h, w)])
        ours = photos.window(rng, h, w, (0.9, 1.0))
        assert ours == tuple(theirs[k] for k in ("top", "left", "height", "width"))


def test_what_is_scored_is_the_middle(tree):
    """As torchvision: shorter side to the stored size, then the middle; never enlarged."""
    split = some_photos(tree, store=40)
    for i in range(6):
        photo = Image.open(split.path(i)).convert("RGB")
        want = tv.center_crop(tv.resize(photo, 40), 32) if min(photo.size) > 40 else None
        want = want or tv.center_crop(photo, 32)
        assert np.abs(photos.centre(split.image(i), 32).astype(int) - np.asarray(want)).max() <= 1
    small = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    want = np.asarray(Image.fromarray(small).resize((32, 32), Image.BILINEAR))
    assert (photos.centre(small, 32) == want).all()


def test_order_and_labels_are_those_of_imagefolder(tree):
    from torchvision.datasets import ImageFolder

    split, theirs = some_photos(tree), ImageFolder(tree / "train")
    assert split.classes == theirs.classes
    assert [str(split.path(i)) for i in range(len(split))] == [path for path, _ in theirs.samples]
    assert split.labels.tolist() == theirs.targets
    few = photos.find(tree, "train", 1000, limit=2)
    kept = [(path, k) for path, k in theirs.samples if k < 2]
    assert few.classes == theirs.classes[:2]
    assert [(str(few.path(i)), few.labels[i]) for i in range(len(few))] == kept


@pytest.mark.parametrize("backwards", [False, True])
def test_photos_in_subfolders_in_any_order_of_the_disk(tmp_path, monkeypatch, backwards):
    train = write_photos(tmp_path / "data", train=1) / "train"
    for name in ("thing0/b/1.jpg", "thing0/a/1.jpg", ".trash/1.jpg"):
        (train / name).parent.mkdir()
        shutil.copy(train / "thing0/0.jpg", train / name)
    walk = os.walk

    def mixed(top):
        for where, subfolders, names in walk(top):
            subfolders.sort(reverse=backwards)
            yield where, subfolders, names

    monkeypatch.setattr(os, "walk", mixed)
    split = some_photos(tmp_path / "data")
    assert split.classes == ["thing0", "thing1", "thing2"]
    found = [split.path(i).relative_to(train).as_posix() for i in range(3)]
    assert found == ["thing0/0.jpg", "thing0/a/1.jpg", "thing0/b/1.jpg"]


def test_cache_holds_what_the_files_say(tree, tmp_path, monkeypatch):
    plain = photos.open_splits(tree, 42, cache="off")
    cached = photos.open_splits(tree, 42, cache_dir=tmp_path)
    for a, b in zip(plain, cached):
        assert b.packed and not a.packed and len(a) == len(b)
        assert all((a.image(i) == b.image(i)).all() for i in range(len(a)))
    again = pickle.loads(pickle.dumps(cached[0]))  # for workers that are no forks
    assert (again.image(3) == plain[0].image(3)).all() and len(again) == 18
    sides = [min(cached[0].image(i).shape[:2]) for i in range(18)]
    assert min(sides) < 42 and max(sides) == 42  # shrunk, but not enlarged
    monkeypatch.setattr(data, "decode", None)  # to build again would fail
    photos.open_splits(tree, 42, cache_dir=tmp_path)
    monkeypatch.undo()
    os.utime(plain[0].path(0), (1, 1))
    photos.open_splits(tree, 42, cache_dir=tmp_path)
    photos.open_splits(tree, 39, cache_dir=tmp_path)
    assert len([*tmp_path.glob("photos-train-42-*")]) == 2
    assert len([*tmp_path.glob("photos-val-42-*")]) == 1
    assert len([*tmp_path.glob("photos-train-39-*")]) == 1


def test_a_cache_that_is_too_large_is_not_built(tree, tmp_path, capsys):
    argv = words(tree, tmp_path / "out", "--cache-dir", str(tmp_path / "c"), "--cache-gb", "1e-9")
    args = pretrain.get_args(argv)
    pretrain.resolve(args)
    _, split, _ = pretrain.open_run(args)
    assert not split.packed and not [*(tmp_path / "c").glob("photos*")]
    assert "more than --cache-gb 0.0" in capsys.readouterr().out
    assert args.workers == parallel.spare_cores()


def test_files_and_cache_train_the_same_weights(tree, tmp_path):
    run(tree, tmp_path / "a")
    run(tree, tmp_path / "b", "--cache", "off", "--workers", "2")
    assert same(*encoders(tmp_path / "a", tmp_path / "b"))


# ------------------------------------------------------------------------------------------------
# mixtures, losses, scores, schedule


def test_mixup_and_cutmix_by_hand(tree):
    """Image for image, from the unmixed batch: pictures, and the share of each class in them."""
    split = some_photos(tree)
    crops = photos.Crops(32)
    boxes = 0
    for kind in (dict(mixup=0.8), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0)):
        host = batch(split, dataclasses.replace(crops, **kind), n=8, step=1)
        images, targets = photos.device_batch(host, "cpu", 3, mixed=True)
        before, _ = photos.device_batch(host, "cpu", 3)
        for k in range(8):
            lam = float(host["share"][k])
            want = lam * before[k] + (1 - lam) * before[k ^ 1]
            y0, y1, x0, x1 = host["box"][k].tolist()
            want[:, y0:y1, x0:x1] = before[k ^ 1][:, y0:y1, x0:x1]
            if y1 > y0 and x1 > x0:
                boxes += 1
                lam = 1 - (y1 - y0) * (x1 - x0) / 32**2
            assert torch.allclose(images[k], want, atol=1e-5)
            share = torch.zeros(3)
            share[host["label"][k]] += lam
            share[host["label"][k ^ 1]] += 1 - lam
            assert torch.allclose(targets[k], share, atol=1e-5)
    assert 8 < boxes < 16  # both kinds, at the third turn
    _, targets = photos.device_batch(batch(split, crops, n=8), "cpu", 3)
    assert targets.sum() == 8 and (targets.max(dim=1).values == 1).all()


def test_mixtures_reach_the_loss(tree, tmp_path, monkeypatch):
    """And nothing else of a batch changes with them."""
    split, seen = some_photos(tree), []

    def steps(run, stage, parts, batches, prepare, *rest):
        seen.append(prepare(hosts[len(seen)]))
        return 0.0

    monkeypatch.setattr(loop, "run_steps", steps)
    hosts = [batch(split, photos.Crops(32, cutmix=a)) for a in (0.0, 1.0)]
    assert all((hosts[0][k] == hosts[1][k]).all() for k in ("image", "x", "y", "colour", "label"))
    for a in "01":
        args = pretrain.get_args(words(tree, tmp_path, "--cutmix", a))
        pretrain.resolve(args)
        run_ = loop.Run(args=args, out=tmp_path, device=torch.device("cpu"))
        net = classifiers.build("nano", 3, 32)
        pretrain.train_classifier(run_, net, None, split, split)
    (plain, hard), (mixed, soft) = seen
    assert set(hard.flatten().tolist()) == {0, 1} and ((soft > 0) & (soft < 1)).any()
    assert not torch.equal(plain, mixed)


def test_mixtures_have_the_shares_of_their_papers():
    """mixup: Beta(a, a). CutMix: a square with 1 - Beta(a, a) of the area, cut by the border."""
    rng = np.random.default_rng(0)
    draws = [photos.mixture(rng, 64, 0.4, 0) for _ in range(4000)]
    lam = np.array([share for share, _ in draws])
    assert abs(lam.mean() - 0.5) < 0.02
    assert abs(lam.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.01  # of a symmetric Beta
    assert {box for _, box in draws} == {(0, 0, 0, 0)}
    draws = [photos.mixture(rng, 1000, 0, 1.0) for _ in range(4000)]
    boxes = np.array([box for share, box in draws if share == 1])
    assert len(boxes) == 4000 and boxes.min() >= 0 and boxes.max() <= 1000
    h, w = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    inner = ((boxes > 0) & (boxes < 1000)).all(axis=1)
    assert (np.abs(h - w)[inner] <= 1).all()  # squares
    # sides sqrt(1 - U) S at a uniform middle: E[height] = S (E[r] - E[r^2] / 4) with r^2 uniform
    assert abs(h.mean() - 1000 * (2 / 3 - 1 / 8)) < 15 and abs(w.mean() - h.mean()) < 20
    both = [photos.mixture(rng, 64, 1.0, 1.0)[0] == 1 for _ in range(2000)]
    assert abs(np.mean(both) - 0.5) < 0.05


def test_cross_entropy_with_smoothing_is_that_of_soft_targets():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 7), torch.rand(5, 7).softmax(dim=1)

    class Net(torch.nn.Module):
        def forward(self, images):
            return Output(logits, (), ())

    ce = functools.partial(pretrain.cross_entropy, weight=0.5, smoothing=0.2)
    learner = Learner(Net(), pretrain.METHODS["none"](None, None), ce)
    got = learner(None, targets, None)
    soft = 0.8 * targets + 0.2 / 7
    assert got.keys() == {"ce"}
    want = -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert got["ce"].item() == pytest.approx(0.5 * want.item(), rel=1e-5)
    hard = F.one_hot(torch.tensor([1, 2, 3, 4, 5]), 7).float()
    want = F.cross_entropy(logits, torch.tensor([1, 2, 3, 4, 5]), label_smoothing=0.2)
    assert learner(None, hard, None)["ce"].item() == pytest.approx(0.5 * want.item(), rel=1e-5)


@pytest.mark.parametrize("k", [1, 5])
def test_hits_by_brute_force(k):
    torch.manual_seed(0)
    for classes in (3, 11):
        logits, labels = torch.randn(40, classes), torch.randint(classes, (40,))
        want = 0
        for row, label in zip(logits.tolist(), labels.tolist()):
            want += sum(v > row[label] for v in row) < k
        assert pretrain.hits(logits, labels, k) == want


def test_scores_of_a_known_net_in_eval_mode(tree, tmp_path):
    """It says class 1 whatever it sees: right for 2 of 6 photos; all labels are among the five."""
    modes = []

    class Net(torch.nn.Module):
        def forward(self, images):
            modes.append(self.training)
            return Output(torch.tensor([[1.0, 2.0, 0.0]]).expand(len(images), 3), (), ())

    args = pretrain.get_args(words(tree, tmp_path, "--eval-batch-size", "4", "--workers", "0"))
    pretrain.resolve(args)
    run_ = loop.Run(args=args, out=tmp_path, device=torch.device("cpu"))
    net = Net()
    got = pretrain.score(run_, photos.find(tree, "val", 37), "encoder", net, 7)
    assert got == dict(top1=2 / 6, top5=1.0, images=6) and modes == [False, False] and net.training
    assert logged(tmp_path) == [dict(stage="encoder", step=7) | got]


def test_cosine_schedule():
    rates = [learning_rate(s, 2.0, 100, warmup=0.1, decay="cosine") for s in range(100)]
    assert rates[0] == pytest.approx(2 / 11) and rates[9] == pytest.approx(20 / 11)
    for s in range(10, 100):
        assert rates[s] == pytest.approx(1 + math.cos(math.pi * (s - 10) / 90))
    assert rates[-1] > 0


# ------------------------------------------------------------------------------------------------
# classifiers


def test_parameters_as_published():
    """DeiT-Tiny and -Small as in timm; MiT-B0's encoder and a Linear from 256 to 1000 classes."""
    published = dict(vit_tiny=5_717_416, vit_small=22_050_664, b0=3_319_392 + 257 * 1000)
    with torch.device("meta"):
        for name, count in published.items():
            assert model.count_parameters(classifiers.build(name, 1000, 224)) == count


def test_classifier_is_encoder_average_and_linear():
    torch.manual_seed(0)
    net = classifiers.build("nano", 5, 64).eval()
    segmenter = model.build("nano", 3).eval()
    segmenter.encoder.load_state_dict(net.encoder.state_dict())
    x = torch.randn(2, 3, 64, 96)
    out = net(x)
    deepest = segmenter(x, head=False).features[3]
    want = deepest.flatten(2).mean(2) @ net.classifier.weight.T + net.classifier.bias
    assert torch.allclose(out.logits, want, atol=1e-5) and out.logits.shape == (2, 5)
    assert [f.shape[1] for f in out.features] == [*net.channels]
    assert net(x, head=False).logits is None


def test_vit_is_torchvisions_and_its_features_are_its_blocks():
    torch.manual_seed(0)
    net = classifiers.build("vit_tiny", 5, 48).eval()
    torch.nn.init.normal_(net.heads.head.weight)  # torchvision's is 0 at first
    theirs = VisionTransformer(48, 8, 12, 3, 192, 768, num_classes=5).eval()
    theirs.load_state_dict(net.state_dict())
    seen = []
    for block in theirs.encoder.layers:
        block.register_forward_hook(lambda m, i, out: seen.append(out))
    x = torch.randn(2, 3, 48, 48)
    out, want = net(x), theirs(x)
    assert torch.allclose(out.logits, want, atol=1e-4)
    assert len(out.features) == len(net.channels) == 8
    for k, f in zip((0, 1, 2, 3, 8, 9, 10, 11), out.features):
        tokens = seen[k][:, 1:].unflatten(1, (6, 6))  # (B, 6, 6, C), rows first
        assert f.shape == (2, 192, 6, 6)
        assert torch.allclose(f, tokens.permute(0, 3, 1, 2), atol=1e-5)
    assert classifiers.build("vit_tiny", 5, 224).conv_proj.kernel_size == (16, 16)
    assert classifiers.build("vit_tiny", 5, 60, patch=12).conv_proj.kernel_size == (12, 12)


def test_encoder_file_starts_training_of_a_segmenter(tree, tmp_path, capsys):
    """As student and as teacher; the head of the classes is left, with a word."""
    run(tree, tmp_path / "pre")
    path = str(tmp_path / "pre/encoder.pt")
    capsys.readouterr()
    folder = write_folder(tmp_path / "data")
    more = "--max-iters 1 --lr 0 --teacher-lr 1e-12 --save-every 0".split()
    train(folder, tmp_path / "out", *more, "--teacher-init", path, "--student-init", path)
    said = capsys.readouterr().out
    net = model.build("nano", 3)
    n, of = len(net.encoder.state_dict()), len(net.state_dict())
    assert said.count(f"{path}: loaded {n} of {of} tensors") == 2
    assert said.count("2 not used: classifier.weight, classifier.bias") == 2
    assert logged(tmp_path / "out")[0]["lr"] == 1e-12
    ours, theirs = weights(tmp_path / "pre", "encoder.pt"), weights(tmp_path / "out")
    for name in net.state_dict():
        if name.startswith("encoder."):
            assert torch.allclose(theirs[name], ours[name], atol=1e-6), name
    with pytest.raises(UserError, match="an encoder without a head"):
        model.load(path)


# ------------------------------------------------------------------------------------------------
# what a teacher teaches


def logits_only(logits, *features):
    return Output(logits, features, ())


def test_kd_of_classifiers_is_the_formula():
    torch.manual_seed(0)
    s, t, T = torch.randn(4, 6), torch.randn(4, 6), 3.0
    args = pretrain.get_args(["--data-dir", "d", "--method", "kd", "--temperature", "3"])
    args.kd_weight = 0.7
    net = classifiers.build("nano", 6, 32)
    method = pretrain.method_of(args, net, net)
    got = method(logits_only(s), logits_only(t), None, None)
    p, q = ((x.double().numpy() / T) for x in (t, s))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (p, q))
    want = 0.7 * T * T * (p * np.log(p / q)).sum(1).mean()
    assert got["kd"].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("axis", ["teacher", "student"])
def test_whole_tat_by_loops(axis):
    torch.manual_seed(0)
    method = WholeTaT((3, 5), (4, 6), tat_axis=axis, tat_weight=0.3)
    s, t = torch.randn(2, 5, 3, 4), torch.randn(2, 6, 6, 8)  # the teacher's map is twice as large
    small = F.avg_pool2d(t, 2)
    q, v = (m(s) for m in (method.query, method.value))
    q, k, v = (x.flatten(2).double().detach().numpy() for x in (q, small, v))  # (B, C, P)
    total = 0
    for b in range(2):
        for i in range(12):
            asks, answers = (q, k) if axis == "teacher" else (k, q)
            row = np.array([asks[b, :, i] @ answers[b, :, j] for j in range(12)])
            w = np.exp(row - row.max())
            w /= w.sum()
            total += ((v[b] @ w - k[b, :, i]) ** 2).sum()
    want = 0.3 * total / (2 * 6 * 12)
    got = method(logits_only(None, None, s), logits_only(None, None, t), None, None)
    assert got["tat"].item() == pytest.approx(want, rel=1e-4)


def test_manifold_of_vits_compares_the_eight_blocks():
    small, tiny = (classifiers.build(n, 3, 32) for n in ("vit_small", "vit_tiny"))
    args = pretrain.get_args(["--data-dir", "d", "--method", "manifold"])
    method = pretrain.method_of(args, tiny, small)
    assert method.stages == (1, 2, 3, 4, 5, 6, 7, 8) and method.weights == (4, 0.1, 0.2)
    net = classifiers.build("nano", 3, 32)
    assert pretrain.method_of(args, net, net).stages == (4,)


@pytest.mark.parametrize("method", [name for name in pretrain.WEIGHTS if name != "none"])
def test_distillation_runs_and_changes_the_student(tree, tmp_path, teacher, method):
    before = Path(teacher).read_bytes()
    run(tree, tmp_path / "alone")
    metrics = run(tree, tmp_path / "out", "--teacher", teacher, "--method", method)
    a, b = encoders(tmp_path / "alone", tmp_path / "out")
    assert not same(a, b) and a.keys() == b.keys()
    trained = json.loads((Path(teacher).parent / "metrics.json").read_text())["encoder"]
    assert metrics["teacher"]["top1"] == trained["top1"] and Path(teacher).read_bytes() == before
    terms = set(steps(tmp_path / "out")[0]) - {"stage", "step", "lr"}
    ce = pretrain.WEIGHTS[method]["ce_weight"]
    assert ("ce" in terms) == bool(ce) and len(terms) > 1


def test_a_small_vit_teaches_a_tiny_one(tree, tmp_path):
    few = ["--max-iters", "2"]
    run(tree, tmp_path / "t", "--model", "vit_small", *few)
    path = str(tmp_path / "t/encoder.pt")
    more = ["--model", "vit_tiny", "--teacher", path, *few]
    run(tree, tmp_path / "m", *more, "--method", "manifold+kd")
    assert {"manifold/patches", "kd/kd"} <= set(steps(tmp_path / "m")[0])
    run(tree, tmp_path / "tat", *more, "--method", "tat")
    with pytest.raises(UserError, match="no nano with a vit_small"):
        run(tree, tmp_path / "b", "--teacher", path, "--method", "manifold")
    with pytest.raises(UserError, match="a vit_small for --size 32 only"):
        run(tree, tmp_path / "b", *more, "--method", "kd", "--size", "48")


# ------------------------------------------------------------------------------------------------
# runs


def test_the_whole_job(tree, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--max-iters", "40", "--lr", "3e-3", "--colour", "0", "--eval-every", "20"]
    metrics = run(tree, out, *more)
    made = {p.name for p in out.glob("[!.]*")}
    assert made == {"encoder.pt", "last.pt", "log.jsonl", "metrics.json"}
    assert metrics["top1"] >= 5 / 6 and metrics["top5"] == 1  # 3 classes, each a colour
    assert metrics["encoder"]["images"] == 6 and metrics["encoder"]["steps"] == 40
    for r in steps(out):
        assert r["lr"] == pytest.approx(learning_rate(r["step"] - 1, 3e-3, 40, 0.05, "cosine"))
    run(tree, tmp_path / "unseen", *more[:-2])
    assert same(*encoders(out, tmp_path / "unseen"))  # scoring changes nothing
    scored = [r for r in logged(out) if "top1" in r]
    assert [r["step"] for r in scored] == [20, 40] and scored[-1]["top1"] == metrics["top1"]
    said = capsys.readouterr().out
    assert "18 photos to learn from, 6 to score, 3 classes" in said and "eta" in said
    net, facts = classifiers.load(out / "encoder.pt")
    val = photos.find(tree, "val", 37)
    x = np.stack([photos.centre(val.image(i), 32) for i in range(6)])
    x = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    best = net(augment.normalise(x, facts["mean"], facts["std"])).logits.argmax(dim=1).tolist()
    assert np.mean([a == b for a, b in zip(best, val.labels)]) == pytest.approx(metrics["top1"])


@pytest.mark.parametrize(
    "more",
    [
        ["--accumulate", "2", "--decay", "linear", "--clip", "0"],
        ["--mixup", "0.8", "--cutmix", "1", "--accumulate", "2"],
        ["--model", "pvt_v2_b0", "--drop-path", "0.2"],
    ],
)
def test_options_run(tree, tmp_path, more):
    metrics = run(tree, tmp_path / "out", *more, "--max-iters", "2")
    assert 0 <= metrics["top1"] <= metrics["top5"] == 1


def test_epochs_are_counted(tree, tmp_path):
    args = pretrain.get_args(["--data-dir", str(tree), "--out-dir", str(tmp_path), "--epochs", "3"])
    args.batch_size = 4
    pretrain.resolve(args)
    _, train_photos, _ = pretrain.open_run(args)
    assert train_photos.store == 256
    assert args.max_iters == 14 and args.lr == pytest.approx(5e-4 * 4 / 512)  # 18 photos
    said = settings.command_line(args, "pretrain.py").split()
    assert said[:2] == ["python", "pretrain.py"]
    again = pretrain.get_args([*said[2:], "--data-dir", str(tree), "--out-dir", str(tmp_path)])
    pretrain.resolve(again)
    pretrain.open_run(again)
    assert settings.recorded(again) == settings.recorded(args)
    default = pretrain.get_args(["--data-dir", str(tree), "--out-dir", str(tmp_path / "b")])
    pretrain.resolve(default)
    pretrain.open_run(default)
    assert default.max_iters == math.ceil(100 * 18 / 256)


@pytest.mark.parametrize("method", [None, "tat+kd", "manifold"])
def test_bfloat16_ten_steps(tree, tmp_path, teacher, method):
    more = ["--teacher", teacher, "--method", method] if method else ["--mixup", "0.8"]
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run(tree, tmp_path / dtype, "--max-iters", "10", "--dtype", dtype, *more)
        losses[dtype] = [r["ce"] for r in steps(tmp_path / dtype)]
    assert len(losses["bfloat16"]) == 10
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]


@pytest.mark.parametrize("method", [[], ["--method", "tat+kd"], ["--cutmix", "1"]])
def test_resume_to_the_same_bits(tree, tmp_path, teacher, method):
    more = [*method, "--save-every", "0"] + ["--teacher", teacher] * ("--method" in method)
    whole = run(tree, tmp_path / "whole", *more)
    with crash("encoder", 3):
        run(tree, tmp_path / "parts", *more)
    parts = run(tree, tmp_path / "parts", *more, "--resume")
    assert same(*encoders(tmp_path / "whole", tmp_path / "parts"))
    assert steps(tmp_path / "whole") == steps(tmp_path / "parts")
    assert parts["top1"] == whole["top1"]
    assert ("teacher" in parts) == bool(method and "tat" in method[1])
    before = (tmp_path / "parts/encoder.pt").read_bytes()
    run(tree, tmp_path / "parts", *more, "--resume")  # finished: nothing to do
    assert (tmp_path / "parts/encoder.pt").read_bytes() == before


def test_no_resume_with_another_teacher(tree, tmp_path, teacher):
    run(tree, tmp_path / "other", "--model", "nano", "--seed", "1", "--max-iters", "1")
    mine = shutil.copy(teacher, tmp_path / "teacher.pt")
    more = ["--teacher", str(mine), "--method", "kd"]
    with crash("encoder", 3):
        run(tree, tmp_path / "out", *more, "--save-every", "0")
    shutil.copy(tmp_path / "other/encoder.pt", mine)
    with pytest.raises(UserError, match="teacher.pt holds other weights now than when this run"):
        run(tree, tmp_path / "out", *more, "--save-every", "0", "--resume")


def test_two_processes_equal_one(tree, tmp_path, teacher):
    """Windows, mixtures, drops, the batch norms of TaT, the shares of what is scored."""
    more = ["--teacher", teacher, "--method", "tat+kd", "--max-iters", "4", "--cutmix", "1"]
    run(tree, tmp_path / "1", *more)
    child = command(*words(tree, tmp_path / "2", *more), processes=2)
    said, errors = child.communicate()
    assert child.returncode == 0, errors
    assert said.count("wrote encoder.pt") == 1  # one process speaks
    one, two = steps(tmp_path / "1"), steps(tmp_path / "2")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert a.pop("stage") == b.pop("stage") and a == pytest.approx(b, rel=2e-4)
    a, b = encoders(tmp_path / "1", tmp_path / "2")
    start = classifiers.build("nano", 3, 32).state_dict()
    assert all((a[k] - b[k]).abs().max() < 5e-4 for k in start)
    a, b = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "12")
    assert a["top1"] == b["top1"] and a["encoder"]["images"] == b["encoder"]["images"] == 6


def test_sigterm_saves_and_resume_goes_on(tree, tmp_path):
    more = ["--max-iters", "30"]
    child = command(*words(tree, tmp_path / "parts", *more))
    for line in child.stdout:
        if "5/30" in line:
            break
    child.send_signal(signal.SIGTERM)
    said, errors = child.communicate()
    assert child.returncode == 128 + signal.SIGTERM and "--resume" in said and not errors
    assert not (tmp_path / "parts/encoder.pt").exists()
    run(tree, tmp_path / "parts", *more, "--resume")
    run(tree, tmp_path / "whole", *more)
    assert same(*encoders(tmp_path / "whole", tmp_path / "parts"))


# ------------------------------------------------------------------------------------------------
# mistakes


def empty(folder):
    for path in folder.rglob("*.*"):
        path.unlink()


MISTAKES = {
    "no folder": (["--data-dir", "/nowhere"], None, "/nowhere/train: no such folder; expected"),
    "no val": ([], lambda d: (d / "val").rename(d / "test"), "val: no such folder"),
    "flat": (
        [],
        lambda d: (
            [p.rename(d / "train" / f"{p.parent.name}{p.name}") for p in d.glob("train/*/*")]
            and [p.rmdir() for p in d.glob("train/*/")]
        ),
        "train: 0 folders of classes, 2 at least; expected",
    ),
    "empty class": ([], lambda d: empty(d / "train/thing1"), "thing1: no photos in it (.jpg"),
    "other classes": (
        [],
        lambda d: (d / "val/thing1").rename(d / "val/cat"),
        "train has 3 classes, val 3; in only one of them: cat, thing1",
    ),
    "unreadable": (
        [],
        lambda d: (d / "train/thing0/0.jpg").write_bytes(b"JFIF"),
        "thing0/0.jpg: cannot be read as an image",
    ),
    "unreadable val": (
        [],
        lambda d: (d / "val/thing0/1.png").write_bytes(b""),
        "thing0/1.png: cannot be read as an image",
    ),
    "no cache": (["--cache", "off", "--cache-gb", "1"], None, "has no effect with --cache off"),
    "too few classes": (["--classes", "4"], None, "train: 3 folders of classes, 4 at least"),
    "one class": (["--classes", "1"], None, "--classes 1: must be 2 to"),
    "small size": (["--size", "31"], None, "--size 31: nano needs 32 at least"),
    "odd size": (["--model", "vit_tiny", "--size", "60"], None, "cuts it into patches of 8"),
    "zero size": (["--size", "0"], None, "--size 0: must be 1 to 4096"),
    "small store": (["--store", "31"], None, "--store 31: less than the --size of 32"),
    "no such model": (["--model", "b9"], None, "unknown model 'b9': choose one of nano"),
    "no such method": (["--method", "skd"], None, "unknown method 'skd': choose one of none, kd"),
    "patch of a MiT": (["--patch", "8"], None, "--patch has no effect on nano"),
    "drop of a ViT": (
        ["--model", "vit_tiny", "--drop-path", "0.1"],
        None,
        "--drop-path has no effect on vit_tiny",
    ),
    "no teacher": (["--method", "kd"], None, "who teaches it is missing, pass --teacher too"),
    "no method": (["--teacher", "x.pt"], None, "what it is to teach is missing, pass --method too"),
    "flag of another method": (
        ["--teacher", "{teacher}", "--method", "kd", "--tat-weight", "1"],
        None,
        "--tat-weight has no effect on --method kd",
    ),
    "flag without method": (
        ["--temperature", "2"],
        None,
        "--temperature has no effect on --method",
    ),
    "nothing to learn": (
        ["--teacher", "{teacher}", "--method", "manifold", "--ce-weight", "0"],
        None,
        "--ce-weight 0 and no soft labels",
    ),
    "idle smoothing": (
        ["--teacher", "{teacher}", "--method", "manifold+kd", "--label-smoothing", "0.1"],
        None,
        "--label-smoothing has no effect with --ce-weight 0",
    ),
    "two lengths": (["--epochs", "2"], None, "--epochs has no effect with --max-iters"),
    "area": (["--area", "0.5", "1.1"], None, "two shares up to 1, the smaller first"),
    "odd pairs": (
        ["--mixup", "1", "--batch-size", "3"],
        None,
        "take photos in pairs: an even number per process",
    ),
    "odd batch": (["--accumulate", "3"], None, "does not divide"),
    "stages of a ViT": (
        ["--model", "vit_tiny", "--teacher", "x", "--method", "manifold", "--manifold-stages", "4"],
        None,
        "--manifold-stages has no effect on vit_tiny",
    ),
    "no such file": (["--teacher", "/no.pt", "--method", "kd"], None, "/no.pt: no such file"),
    "one photo for tat": (
        ["--teacher", "x", "--method", "tat", "--batch-size", "1"],
        None,
        "tat with one photo at a time needs a --size of 64",
    ),
}


@pytest.mark.parametrize("name, cache", with_and_without_cache(MISTAKES))
def test_mistakes(tmp_path, teacher, name, cache):
    more, change, message = MISTAKES[name]
    tree = write_photos(tmp_path / "data", train=2)
    if change:
        change(tree)
    more = [word.format(teacher=teacher) for word in more]
    with pytest.raises(UserError) as e:
        run(tree, tmp_path / "out", "--cache", cache, "--workers", "0", *more)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out/encoder.pt").exists()


def test_checkpoints_of_another_kind(tree, tmp_path, teacher):
    def taught_by(path, *more):
        run(tree, tmp_path / "out", "--teacher", str(path), "--method", "kd", *more)

    model.save(tmp_path / "seg.pt", model.build("nano", 3))
    with pytest.raises(UserError, match="seg.pt: nano, and no classifier; pass an encoder.pt"):
        taught_by(tmp_path / "seg.pt")
    with pytest.raises(UserError, match="last.pt: something else, and no classifier"):
        taught_by(Path(teacher).parent / "last.pt")
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "others.pt")
    with pytest.raises(UserError, match="others.pt: something else, and no classifier"):
        taught_by(tmp_path / "others.pt")
    tree4 = write_photos(tmp_path / "four", classes=4)
    with pytest.raises(UserError, match="knows 3 classes .thing0, thing1, thing2., .* has 4"):
        run(tree4, tmp_path / "out", "--teacher", teacher, "--method", "kd")
    run(tree4, tmp_path / "three", "--teacher", teacher, "--method", "kd", "--classes", "3")
    known = classifiers.load(tmp_path / "three/encoder.pt")[1]["classes"]
    assert known == ["thing0", "thing1", "thing2"]
    net, facts = classifiers.load(teacher)
    state = net.state_dict()
    del state["classifier.bias"]
    files.save_tensors(tmp_path / "cut.pt", facts | {"state_dict": state})
    with pytest.raises(UserError, match="cut.pt: damaged, or no nano .*classifier.bias"):
        taught_by(tmp_path / "cut.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="text.pt: not a checkpoint of tensors"):
        taught_by(tmp_path / "text.pt")


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    """In worker processes too: nothing of a traceback."""
    tree = write_photos(tmp_path / "data", train=2)
    (tree / "train/thing0/0.jpg").write_bytes(b"")
    child = command(*words(tree, tmp_path / "out", "--cache", "off", "--workers", "2"))
    _, errors = child.communicate()
    assert child.returncode == 2
    assert errors.startswith("error: ") and errors.count("\n") == 1 and "thing0/0.jpg" in errors


def test_a_run_goes_on_with_its_own_photos_only(tmp_path):
    tree = write_photos(tmp_path / "data", train=2)
    run(tree, tmp_path / "out", "--max-iters", "1")
    photo = next((tree / "train/thing0").glob("*.jpg"))
    photo.rename(photo.with_stem("other"))
    others = "the data are others: checksum of names and sizes was "
    with pytest.raises(UserError, match=others):
        run(tree, tmp_path / "out", "--resume", "--max-iters", "1")
    photo.with_stem("other").rename(photo)
    run(tree, tmp_path / "out", "--resume", "--max-iters", "1")
    photo.write_bytes(photo.read_bytes() + b" ")
    with pytest.raises(UserError, match=others):
        run(tree, tmp_path / "out", "--resume", "--max-iters", "1")
    photo.write_bytes(photo.read_bytes()[:-1])
    elsewhere = tree.rename(tmp_path / "moved")
    run(elsewhere, tmp_path / "out", "--resume", "--max-iters", "1")


def test_a_finished_run_has_its_encoder(tree, tmp_path):
    other, out = tmp_path / "other", tmp_path / "out"
    run(tree, out, "--max-iters", "1")
    run(tree, other, "--max-iters", "1", "--seed", "1", "--lr", "0")
    torch.manual_seed(1)
    assert same(classifiers.build("nano", 3, 32).state_dict(), *encoders(other))
    run(tree, out, "--max-iters", "1", "--resume")
    shutil.copy(other / "encoder.pt", out / "encoder.pt")
    with pytest.raises(UserError, match="encoder.pt holds other weights now"):
        run(tree, out, "--max-iters", "1", "--resume")
    (out / "encoder.pt").unlink()
    with pytest.raises(UserError, match="encoder.pt: no such file"):
        run(tree, out, "--max-iters", "1", "--resume")


def test_a_classifier_starts_as_segformers_layers_do():
    last = classifiers.build("nano", 1000, 32).classifier
    assert last.weight.std().item() == pytest.approx(0.02, rel=0.05) and not last.bias.any()


def test_a_classifier_that_was_read_is_in_eval_mode(tmp_path):
    net = classifiers.build("nano", 2, 32)
    classifiers.save(tmp_path / "x.pt", net, size=32, patch=None, classes=["a", "b"])
    assert net.training and not classifiers.load(tmp_path / "x.pt")[0].training
    assert [classifiers.default_patch(n) for n in (127, 128)] == [8, 16]


@pytest.mark.parametrize(
    "method, want",
    [
        ("none", (1, None, None, 0.1)),
        ("kd", (0.5, 0.5, None, 0.1)),
        ("manifold", (1, None, None, 0.1)),
        ("manifold+kd", (0, 1, None, 0)),
        ("tat", (0.1, None, 0.2, 0.1)),
        ("tat+kd", (0.5, 0.5, 0.1, 0.1)),
    ],
)
def test_defaults_of_the_methods(method, want):
    teacher = [] if method == "none" else ["--teacher", "x.pt"]
    args = pretrain.get_args(["--data-dir", "d", "--method", method, *teacher])
    pretrain.resolve(args)
    got = args.ce_weight, args.kd_weight, args.tat_weight, args.label_smoothing
    assert got == want and args.store == 256


def test_windows_and_mixtures_are_those_of_the_flags(tree, tmp_path, monkeypatch):
    seen, real = [], photos.Crops
    monkeypatch.setattr(photos, "Crops", lambda *a: seen.append(real(*a)) or seen[-1])
    more = ["--area", "0.2", "0.9", "--colour", "0.3", "--mixup", "0.7", "--cutmix", "1.5"]
    run(tree, tmp_path / "out", "--max-iters", "1", *more)
    assert seen == [real(size=32, area=(0.2, 0.9), colour=0.3, mixup=0.7, cutmix=1.5)]


def test_loss_and_rates_are_those_of_the_flags(tree, tmp_path, monkeypatch):
    seen = []

    def steps(run, stage, parts, batches, prepare, frozen, schedule, scoring):
        seen.append((parts["learner"].ce, batches.seed, learning_rate(4, **schedule)))
        return 0.0

    monkeypatch.setattr(loop, "run_steps", steps)
    more = "--ce-weight 0.3 --label-smoothing 0.2 --decay linear --warmup 0.5 --seed 5".split()
    args = pretrain.get_args(words(tree, tmp_path, *more))
    pretrain.resolve(args)
    run_ = loop.Run(args=args, out=tmp_path, device=torch.device("cpu"))
    net, split = classifiers.build("nano", 3, 32), some_photos(tree)
    pretrain.train_classifier(run_, net, None, split, split)
    ((ce, seed, rate),) = seen
    logits, targets = torch.randn(4, 3), torch.rand(4, 3).softmax(dim=1)
    want = 0.3 * F.cross_entropy(logits, targets, label_smoothing=0.2)
    assert torch.allclose(ce(logits, targets), want) and seed == 5
    assert rate == learning_rate(4, 1e-3, 6, 0.5, "linear")


def test_numbers_that_are_too_small_or_large():
    bad = "ce-weight -1|mixup -1|cutmix -1|label-smoothing 1|drop-path 1|store 0|patch 0|epochs 0"
    bad += "|lr -1|accumulate 0|batch-size 0|max-iters 0|manifold-rows 0|kd-weight -1"
    for words_ in bad.split("|"):
        flag, value = words_.split()
        with pytest.raises(UserError, match=f"--{flag} {value}.*: must be "):
            pretrain.resolve(pretrain.get_args(["--data-dir", "d", f"--{flag}", value]))


def test_top_5_of_many_classes(tmp_path):
    """The net puts the eight classes in one order, whatever it sees."""

    class Order(torch.nn.Module):
        def forward(self, images):
            return model.Output(torch.arange(8.0).expand(len(images), 8), (), ())

    write_photos(tmp_path / "d", train=1, val=1, classes=8)
    args = Namespace(size=32, eval_batch_size=3, workers=0, dtype="float32")
    run_ = loop.Run(args=args, out=tmp_path, device=torch.device("cpu"))
    got = pretrain.score(run_, photos.find(tmp_path / "d", "val", 37), "encoder", Order(), 0)
    assert (got["top1"], got["top5"], got["images"]) == (1 / 8, 5 / 8, 8)
