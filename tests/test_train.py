"""The loop: schedule, resume, processes, signals, files, and words for a user's mistakes."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_folder
from PIL import Image
from test_weights import nvlabs

import catalog
import data
import distill
import eval as evaluation
import files
import flops
import loop
import methods
import model
import parallel
import train
from augment import Augment
from files import UserError
from settings import recorded
from step import Teacher, learning_rate, parameter_groups

ROOT = Path(train.__file__).parent
SMALL = "--student nano --crop-size 32 --batch-size 4 --max-iters 6".split()


def words(folder, out, *more):
    where = ["--dataset", "folder", "--data-dir", str(folder), "--out-dir", str(out)]
    given = dict(zip(more, more[1:]))
    trained = given.get("--method") != "none" and "--teacher-ckpt" not in more
    teacher = ["--teacher", "nano"] if trained else []
    return [*where, *SMALL, *teacher, *more]


def run(folder, out, *more):
    train.main(train.get_args(words(folder, out, *more)))
    return json.loads((Path(out) / "metrics.json").read_text())


def logged(out):
    """The records of log.jsonl."""
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def weights(out, name="student.pt"):
    return torch.load(Path(out) / name, weights_only=True)["state_dict"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def command(*argv, processes=1, script="train.py", **kw):
    """A script as a user starts it."""
    python = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    if processes > 1:
        python += ["--master_port", str(29500 + os.getpid() % 1000)]
    python = python if processes > 1 else [sys.executable]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*python, str(ROOT / script), *argv], env=env, **pipes, **kw)


class Stop(Exception):
    pass


@contextlib.contextmanager
def crash(stage, step):
    """The run within ends as soon as it has saved its state after this step."""
    save = loop.save_state

    def save_and_die(run_, at=None, done=0, *more):
        save(run_, at, done, *more)
        if (at, done) == (stage, step):
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, "save_state", save_and_die)
        yield


# ------------------------------------------------------------------------------------------------
# pieces


def test_learning_rate():
    rates = [learning_rate(s, 1.0, 100, warmup=0.1) for s in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and rates[9] == pytest.approx(10 / 11)
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 90)
    assert learning_rate(0, 1.0, 100) == 1


def test_learning_rate_of_the_paper():
    """Once an epoch: 5.996e-5 in the first, 4e-5 in epoch 500, 2e-5, not 0, in epoch 1000."""
    n = 1488  # steps an epoch of Cityscapes at batch 2
    for epoch, lr in ((1, 5.996e-5), (500, 4e-5), (1000, 2e-5)):
        for step in ((epoch - 1) * n, epoch * n - 1):
            assert learning_rate(step, 6e-5, 10**9, paper_epoch=n) == pytest.approx(lr)
    assert learning_rate(1600 * n, 6e-5, 10**9, paper_epoch=n) == 0


def test_weight_decay_is_on_matrices_only():
    net = model.build("nano", 3)
    decayed, rest = parameter_groups(net, 0.01, everything=False)
    assert decayed["weight_decay"] == 0.01 and rest["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in rest["params"])
    (everything,) = parameter_groups(net, 0.01, everything=True)
    assert len(everything["params"]) == len(decayed["params"]) + len(rest["params"])


def test_class_weights_of_the_paper(folder):
    """1 / ln(1.10 + p): 10.4 for a class that hardly occurs, 1.4 for one that is all there is."""
    args = train.get_args(words(folder, folder / "out"))
    train.resolve(args)
    run = train.open_run(args)
    got = train.class_weights(run, run.train)
    counts = torch.zeros(3)
    for i in range(6):
        label = torch.from_numpy(catalog.read_label(folder / "labels" / f"p{i}.png"))
        counts += torch.bincount(label[label != 255].long(), minlength=3)
    assert torch.allclose(got, 1 / torch.log(1.10 + counts / counts.sum()), atol=1e-5)
    run.device = torch.device("meta")
    assert train.class_weights(run, run.train).is_meta
    args.class_weights = "none"
    assert train.class_weights(run, run.train) is None
    assert distill.paper_weights(torch.zeros(2)).tolist() == pytest.approx([1 / math.log(1.1)] * 2)


def test_teacher_with_another_normalisation_sees_the_same_pixels():
    seen = []

    class Net(torch.nn.Module):
        def forward(self, images, head):
            seen.append(images)

    images = torch.rand(2, 3, 8, 8)
    mine = (model.IMAGENET_MEAN, model.IMAGENET_STD)
    normalised = train.augment.normalise(images, *mine)
    for mean, std in (([0.0] * 3, [1.0] * 3), mine):
        Teacher(Net(), dict(mean=mean, std=std, void=None), *mine)(normalised)
    assert torch.allclose(seen[0], images, atol=1e-6) and seen[1] is normalised


# ------------------------------------------------------------------------------------------------
# the whole job


def test_the_whole_job(folder, tmp_path, capsys):
    out = tmp_path / "out"
    (folder / "classes.txt").write_text("a 9 8 7\nb 1 2 3\nc 5 5 5\n")
    metrics = run(folder, out, "--alone")
    made = "alone.pt last.pt log.jsonl metrics.json samples.png student.pt teacher.pt"
    assert sorted(p.name for p in out.glob("[!.]*")) == made.split()
    assert metrics["miou"] == metrics["student"]["miou"]
    assert metrics["deployed"].items() <= flops.measure_named("nano", 3, (32, 32)).items()
    assert metrics["deployed"]["params"] == model.count_parameters(model.build("nano", 3))
    log = logged(out)
    assert {r["stage"] for r in log} == {"teacher", "alone", "student"}
    assert {"ce", "features", "embeddings"} <= set(log[-2])
    said = capsys.readouterr().out
    assert "SCRATCH" in said and "student alone (nano)" in said and "eta" in said
    for title in ("teacher", "student alone", "student, transkd-base"):
        row = metrics["alone" if "alone" in title else title.split(",")[0]]
        (line,) = [x for x in said.splitlines() if x.startswith(f"{title} (nano)")]
        shares = [f"{100 * row[k]:.2f}" for k in ("miou", "pixel_acc", "boundary_iou")]
        assert line.split()[-4:] == [*shares, loop.clock(row["seconds"])]
    net, facts = model.load(out / "student.pt")
    assert facts["palette"] == [[9, 8, 7], [1, 2, 3], [5, 5, 5]]
    assert not any("csf" in k or "pea" in k for k in net.state_dict())
    split = data.open_split(catalog.open_dataset("folder", folder), "val", folder)
    assert evaluation.evaluate(net, split, facts)["miou"] == pytest.approx(metrics["miou"])
    titles, *rows = np.split(np.asarray(Image.open(out / "samples.png")), [24, 290, 556])
    assert titles.shape == (24, 5 * 320, 3) and [len(row) for row in rows] == [266] * 3
    x = evaluation.prepare(split.image(2), facts)
    ids = [split.label(2)]  # then teacher, student alone, student
    for name in ("teacher", "alone", "student"):
        ids.append(evaluation.predict_ids(model.load(out / f"{name}.pt")[0], x, (40, 48))[0])
    painted = [evaluation.paint(np.asarray(y), facts["palette"]) for y in ids]
    for k, part in enumerate([split.image(2), *painted]):
        shown = Image.fromarray(part).resize((320, 266), Image.NEAREST)
        assert (rows[2][:, 320 * k : 320 * (k + 1)] == np.asarray(shown)).all()


def test_the_command_line_it_prints_is_the_run(folder, tmp_path, monkeypatch):
    more = ["--alone", "--crop-size", "32", "64", "--temperature", "2", "--method", "kd"]
    more += ["--clip", "0", "--colour", "0", "--scale", "0.7", "1.5", "--cache", "off"]
    args = train.get_args(words(folder, tmp_path / "out", *more))
    train.resolve(args)
    assert train.open_run(args).augment == Augment((32, 64), (0.7, 1.5), colour=0)
    assert args.workers == parallel.spare_cores()
    said = train.command_line(args).split()
    assert said[:2] == ["python", "train.py"]
    with monkeypatch.context() as m:
        m.setattr(sys, "argv", ["somewhere/idea.py", "--method", "idea"])
        assert train.command_line(args).split() == ["python", "idea.py", *said[2:]]
    where = ["--data-dir", str(folder), "--out-dir", str(tmp_path / "again")]
    again = train.get_args([*said[2:], *where])
    train.resolve(again)
    train.open_run(again)
    assert recorded(again) == recorded(args)
    args.alone = False
    assert "--no-alone" in train.command_line(args)
    args = train.get_args(["--recipe", "paper", "--method", "none"])
    train.resolve(args)
    train.resolve(train.get_args(train.command_line(args).split()[2:]))  # no flag too many


def test_a_teacher_that_is_there_is_not_trained(folder, tmp_path):
    run(folder, tmp_path / "a")
    ckpt = str(tmp_path / "a" / "teacher.pt")
    before = Path(ckpt).read_bytes()
    metrics = run(folder, tmp_path / "b", "--teacher-ckpt", ckpt)
    assert not (tmp_path / "b" / "teacher.pt").exists() and metrics["teacher"]["steps"] == 0
    trained = json.loads((tmp_path / "a" / "metrics.json").read_text())["teacher"]
    assert metrics["teacher"]["miou"] == trained["miou"]
    assert Path(ckpt).read_bytes() == before
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_distillation_changes_the_student_and_none_needs_no_teacher(folder, tmp_path):
    run(folder, tmp_path / "a", "--alone")
    metrics = run(folder, tmp_path / "b", "--method", "none")
    assert "teacher" not in metrics
    assert same(weights(tmp_path / "a", "alone.pt"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "transkd-gl"],
        ["--method", "transkd-ea+kd", "--temperature", "2"],
        "--method transkd-base --feature-loss cwd --embed 4 --csf-norm batch".split(),
        ["--ema", "0.9", "--class-weights", "none"],
        ["--dtype", "bfloat16"],
        ["--accumulate", "2", "--clip", "0"],
        ["--cache", "off", "--workers", "2"],
        ["--eval-every", "2", "--protocol", "paper"],
    ],
)
def test_options_run(folder, tmp_path, more):
    metrics = run(folder, tmp_path / "out", *more, "--max-iters", "3")
    assert 0 <= metrics["miou"] <= 1
    assert not same(weights(tmp_path / "out"), model.build("nano", 3).state_dict())


@pytest.mark.parametrize("native", [True, False])
def test_a_dtype_that_the_device_emulates_is_said_to_be_slow(
    folder, tmp_path, monkeypatch, capsys, native
):
    monkeypatch.setattr(parallel, "has_native", lambda *_: native)
    run(folder, tmp_path / "out", "--dtype", "bfloat16", "--method", "none", "--max-iters", "1")
    assert ("emulates bfloat16" in capsys.readouterr().out) == (not native)


def test_scoring_is_in_the_dtype_of_training(folder, tmp_path, monkeypatch):
    seen, real = [], evaluation.predict_ids

    def spy(net, images, *a, **kw):
        seen.append((len(images), torch.is_autocast_enabled("cpu")))
        return real(net, images, *a, **kw)

    monkeypatch.setattr(evaluation, "predict_ids", spy)
    more = "--method none --max-iters 1 --dtype bfloat16 --eval-batch-size 2".split()
    run(folder, tmp_path / "out", *more)
    assert seen[:2] == [(2, True), (1, True)]
    assert model.load(tmp_path / "out/student.pt")[1]["dtype"] == "bfloat16"


def test_it_learns(folder, tmp_path):
    """Pictures whose colours are their labels: after a minute at most, nearly all is right."""
    more = ["--method", "none", "--max-iters", "150", "--lr", "3e-3", "--batch-size", "6"]
    metrics = run(folder, tmp_path / "out", *more, "--colour", "0")
    assert metrics["miou"] > 0.6


def test_recipe_paper(folder, tmp_path):
    small = ["--student", "nano", "--teacher", "nano", "--recipe", "paper"]
    where = ["--dataset", "folder", "--data-dir", str(folder), "--out-dir", str(tmp_path / "out")]
    args = train.get_args([*where, *small])
    train.resolve(args)
    run_ = train.open_run(args)
    assert (args.batch_size, args.teacher_batch_size, args.lr) == (2, 8, 6e-5)
    assert (args.max_iters, args.teacher_iters) == (3000, 1000)  # 1000 epochs of 6 images
    assert args.csf_norm == "batch" and args.class_weights == args.protocol == "paper"
    assert args.clip == args.colour == 0
    assert run_.augment.crop == (512, 614) and run_.augment.fit and run_.augment.label_stride == 4
    assert run_.facts["std"] == [1.0] * 3 and run_.facts["resize"] == 512
    few = train.get_args([*where, *small, "--student-images", "4"])
    train.resolve(few)
    train.open_run(few)
    assert (few.max_iters, few.teacher_iters) == (2000, 1000)
    train.main(train.get_args([*where, *small, "--max-iters", "1"]))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["student"]["protocol"] == "paper"
    for more in (["--method", "kd"], ["--feature-weight", "0"], ["--feature-loss", "none"]):
        default = train.get_args([*small, *more])
        train.resolve(default)
        assert default.csf_norm is None  # not an option of kd, nor of PEA alone


def test_few_labels(folder, tmp_path, capsys):
    """Of the images without labels the student learns by distillation, whatever is in their labels.

    The student alone does without these images.
    """
    run(folder, tmp_path / "teacher", "--method", "none")
    ckpt = ["--teacher-ckpt", str(tmp_path / "teacher/student.pt")]
    few = ["--student-labels", "2"]
    run(folder, tmp_path / "a", *ckpt, *few, "--alone")
    assert "student from 6 of 6 training images, labels of 2\n" in capsys.readouterr().out
    run(folder, tmp_path / "images", *ckpt, "--student-images", "2", "--alone")
    run(folder, tmp_path / "none", "--method", "none", *few)
    assert same(weights(tmp_path / "a", "alone.pt"), weights(tmp_path / "images", "alone.pt"))
    assert same(weights(tmp_path / "a", "alone.pt"), weights(tmp_path / "none"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "images"))
    for i in (1, 2, 3, 4):  # evenly spaced: p0 and p5 keep theirs
        path = folder / "labels" / f"p{i}.png"
        Image.new("L", Image.open(path).size, 1).save(path)
    run(folder, tmp_path / "b", *ckpt, *few)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    with pytest.raises(UserError, match="7 images of a split that has 6"):
        run(folder, tmp_path / "c", *ckpt, "--student-labels", "7")


def test_photos_without_labels(folder, tmp_path, capsys):
    """Of these the student learns; it is the run in which they have labels that nobody reads."""
    lines = (folder / "train.txt").read_text().splitlines()
    (folder / "train.txt").write_text("\n".join(lines[:2]))
    (folder / "unlabelled.txt").write_text("\n".join(lines[2:]))
    run(folder, tmp_path / "teacher", "--method", "none")
    ckpt = ["--teacher-ckpt", str(tmp_path / "teacher/student.pt")]
    more = [*ckpt, "--unlabelled", "unlabelled"]
    run(folder, tmp_path / "a", *more, "--alone")
    assert "from 2 of 2 training images, and 4 without labels\n" in capsys.readouterr().out
    assert same(weights(tmp_path / "a", "alone.pt"), weights(tmp_path / "teacher"))
    run(folder, tmp_path / "plain", *ckpt)
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "plain"))
    for stem in lines[2:]:
        (folder / "labels" / f"{stem}.png").unlink()
    run(folder, tmp_path / "b", *more)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    (folder / "train.txt").write_text("\n".join([lines[0], *lines[2:5], lines[1]]))
    for stem in lines[2:]:
        Image.new("L", (48, 40), 255).save(folder / "labels" / f"{stem}.png")
    (folder / "unlabelled.txt").write_text(lines[5])
    run(folder, tmp_path / "c", *more, "--student-labels", "2")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    for words_, said in (
        (["--unlabelled", "val"], "train and val have parts of their own"),
        (["--unlabelled", "test"], "no split 'test': choose train, val, unlabelled"),
        (["--unlabelled", "unlabelled", "--method", "none"], "has no effect on --method none"),
    ):
        with pytest.raises(UserError, match=said):
            run(folder, tmp_path / "d", *words_)


def test_short_side_is_shrinking_by_hand(tmp_path):
    """As images and labels shrunk before; val is scored at the size of its labels."""
    large, small = (write_folder(tmp_path / name, height=80, width=96) for name in ("a", "b"))
    for stem in (small / "train.txt").read_text().split():
        for kind, how in (("images", Image.BILINEAR), ("labels", Image.NEAREST)):
            path = small / kind / f"{stem}.png"
            Image.open(path).resize((48, 40), how).save(path)
    metrics = run(large, tmp_path / "large", "--short-side", "40")
    by_hand = run(small, tmp_path / "small", "--short-side", "0")
    assert same(weights(tmp_path / "large"), weights(tmp_path / "small"))
    assert metrics["miou"] != by_hand["miou"]  # that is scored without resizing
    net, facts = model.load(tmp_path / "large/student.pt")
    assert facts["short_side"] == facts["resize"] == 40
    assert model.load(tmp_path / "small/student.pt")[1]["resize"] is None
    sizes = []
    net.register_forward_pre_hook(lambda net, x: sizes.append(tuple(x[0].shape[2:])))
    val = data.open_split(catalog.open_dataset("folder", large), "val", cache="off")
    again = evaluation.evaluate(net, val, facts)
    assert sizes == [(40, 48)] and val.label(0).shape == (80, 96)
    assert again["miou"] == metrics["miou"]
    (large / "unlabelled.txt").write_text("p0")
    more = "--short-side 40 --unlabelled unlabelled".split()
    args = train.get_args(words(large, tmp_path, *more))
    train.resolve(args)
    assert train.open_run(args).unlabelled.image(0).shape == (40, 48, 3)


def test_where_data_are_by_default(tmp_path, monkeypatch):
    """In data/NAME, for training, scoring and the check; where that is not, the words for it."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "data/nyuv2", classes=40)
    train.main(train.get_args(["--dataset", "nyuv2", "--method", "none", *SMALL]))
    ckpt = ["--ckpt", "out/nyuv2-nano-none/student.pt"]
    evaluation.main(evaluation.get_args(ckpt))
    data.main(data.get_args(["check", "--dataset", "nyuv2"]))
    how = "--data-dir data/camvid: no such folder; python data.py download camvid --data-dir data/"
    for command_ in (
        lambda: train.main(train.get_args(["--dataset", "camvid"])),
        lambda: evaluation.main(evaluation.get_args([*ckpt, "--dataset", "camvid"])),
        lambda: data.main(data.get_args(["check", "--dataset", "camvid"])),
    ):
        with pytest.raises(UserError, match=how):
            command_()
    with pytest.raises(UserError, match="--dataset folder needs --data-dir"):
        train.main(train.get_args(["--dataset", "folder"]))


def test_short_side_of_published_scores():
    for dataset, more, side in (
        ("ade20k", [], 512),
        ("ade20k", ["--short-side", "0"], 0),
        ("ade20k", ["--recipe", "paper"], None),
        ("camvid", [], None),
    ):
        args = train.get_args(["--dataset", dataset, *more])
        train.resolve(args)
        assert args.short_side == side


def test_stride_of_labels_and_images_as_they_are(folder, tmp_path):
    more = ["--label-stride", "4", "--normalise", "none"]
    args = train.get_args(words(folder, tmp_path / "out", *more))
    train.resolve(args)
    run_ = train.open_run(args)
    batch = next(loop.load(train.make_batches(run_, run_.train, 4), range(1), 0, run_.device))
    facts = run_.facts
    images, labels = train.augment.device_batch(batch, "cpu", facts["mean"], facts["std"])
    assert images.shape[2:] == (32, 32) and labels.shape == (4, 8, 8)
    assert 0 <= images.min() and images.max() <= 1 and facts["std"] == [1.0] * 3
    run(folder, tmp_path / "out", *more)
    assert model.load(tmp_path / "out/student.pt")[1]["mean"] == [0.0] * 3


def test_seconds_are_those_of_training(folder, tmp_path, monkeypatch):
    """Scoring is not training; an interrupted stage took what its parts took."""
    clock = [0.0]  # which stands still, but for these two

    def slow(seconds, work):
        def slower(*a, **kw):
            clock[0] += seconds
            return work(*a, **kw)

        return slower

    monkeypatch.setattr(loop.time, "time", lambda: clock[0])
    monkeypatch.setattr(evaluation, "evaluate", slow(3, evaluation.evaluate))
    monkeypatch.setattr(loop, "update", slow(0.2, loop.update))
    more = ["--method", "none", "--eval-every", "2", "--save-every", "0.5"]
    saves, save = [], loop.save_state
    monkeypatch.setattr(loop, "save_state", lambda *a: saves.append(a[2:3]) or save(*a))
    with crash("student", 4):
        run(folder, tmp_path / "out", *more)
    assert saves == [(2,), (4,)]
    seconds = run(folder, tmp_path / "out", *more, "--resume")["student"]["seconds"]
    assert seconds == pytest.approx(6 * 0.2)


# ------------------------------------------------------------------------------------------------
# interrupted, resumed, in several processes


def test_ema_is_a_running_average(folder, tmp_path, monkeypatch):
    steps, save = [], loop.save_state

    def keep(run_, at=None, done=0, parts=None, *more):
        if parts:
            steps.append({k: v.clone() for k, v in parts["learner"].student.state_dict().items()})
        save(run_, at, done, parts, *more)

    monkeypatch.setattr(loop, "save_state", keep)
    scored, real = [], evaluation.evaluate

    def evaluate(net, *a, **kw):
        scored.append({k: v.clone() for k, v in net.state_dict().items()})
        return real(net, *a, **kw)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    more = ["--method", "none", "--ema", "0.75", "--max-iters", "3", "--save-every", "0"]
    run(folder, tmp_path / "out", *more, "--eval-every", "2")
    for name, got in weights(tmp_path / "out").items():
        if got.is_floating_point():
            a, b, c = (s[name] for s in steps)
            assert torch.allclose(got, 0.75 * (0.75 * a + 0.25 * b) + 0.25 * c, atol=1e-6), name
            assert torch.allclose(scored[0][name], 0.75 * a + 0.25 * b, atol=1e-6), name


def log_of(out):
    return [(r["stage"], r["step"], r.get("miou")) for r in logged(out)]


THREE_STAGES = ["--alone", "--ema", "0.9", "--save-every", "0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    place = tmp_path_factory.mktemp("whole")
    run(write_folder(place / "data"), place / "out", *THREE_STAGES)
    return place / "out"


@pytest.mark.parametrize("stage, step", [("teacher", 2), ("alone", 4), ("student", 3)])
def test_resume_to_the_same_bits(folder, tmp_path, whole, stage, step):
    with crash(stage, step):
        run(folder, tmp_path, *THREE_STAGES)
    run(folder, tmp_path, *THREE_STAGES, "--resume")
    for name in ("teacher.pt", "alone.pt", "student.pt"):
        assert same(weights(whole, name), weights(tmp_path, name)), name
    logs = [log_of(out) for out in (whole, tmp_path)]
    assert [r for r in logs[0] if r[2] is not None] == [r for r in logs[1] if r[2] is not None]


def test_no_resume_with_another_teacher(folder, tmp_path, whole):
    teacher, more = tmp_path / "t.pt", ["--teacher-ckpt", str(tmp_path / "t.pt")]
    shutil.copy(whole / "alone.pt", teacher)
    with crash("student", 2):
        run(folder, tmp_path / "out", *more, "--save-every", "0")
    shutil.copy(whole / "student.pt", teacher)  # a net of the same kind
    with pytest.raises(UserError, match="t.pt holds other weights now than when this run began"):
        run(folder, tmp_path / "out", *more, "--save-every", "0", "--resume")
    shutil.copy(whole / "alone.pt", teacher)
    run(folder, tmp_path / "out", *more, "--save-every", "0", "--resume")


def test_resume_in_parts_of_a_batch(folder, tmp_path):
    more = ["--method", "none", "--accumulate", "2", "--save-every", "0"]
    run(folder, tmp_path / "whole", *more)
    with crash("student", 3):
        run(folder, tmp_path / "parts", *more)
    run(folder, tmp_path / "parts", *more, "--resume")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_teacher_from_weights_is_resumed_at_the_rate_for_these(folder, tmp_path):
    """And without them: what it started from is in last.pt."""
    model.save(tmp_path / "init.pt", model.build("nano", 3))
    more = ["--teacher-init", str(tmp_path / "init.pt"), "--lr", "0.01", "--save-every", "0"]
    run(folder, tmp_path / "whole", *more)
    with crash("teacher", 2):
        run(folder, tmp_path / "parts", *more)
    (tmp_path / "init.pt").unlink()
    run(folder, tmp_path / "parts", *more, "--resume")
    assert same(*(weights(tmp_path / name, "teacher.pt") for name in ("whole", "parts")))


def test_one_small_image_at_a_time(folder, tmp_path):
    """Its deepest map is 1x1, which no batch norm of this method sees."""
    metrics = run(
        folder, tmp_path / "out", "--method", "fitnet", "--batch-size", "1", "--max-iters", "1"
    )
    assert metrics["student"]["steps"] == 1


def test_a_line_counts_all_parts_of_a_batch(folder, tmp_path, monkeypatch):
    sizes, real = [], loop.TrainingLog
    monkeypatch.setattr(loop, "TrainingLog", lambda *a: sizes.append(a[3]) or real(*a))
    run(folder, tmp_path / "out", "--method", "none", "--accumulate", "2", "--max-iters", "1")
    assert sizes == [4]


def test_killed_after_its_last_score(folder, tmp_path):
    """A stage that is scored again is in the log once."""
    more = ["--method", "none", "--eval-every", "3", "--log-every", "0", "--save-every", "0"]

    def kill(*a, **kw):
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(model, "save", kill)
        run(folder, tmp_path / "out", *more)
    before = log_of(tmp_path / "out")
    assert [step for _, step, miou in before if miou is not None] == [3, 6]
    run(folder, tmp_path / "out", *more, "--resume")
    assert log_of(tmp_path / "out") == before


@pytest.mark.parametrize("workers", ["0", "1"])
def test_sigterm_saves_and_resume_goes_on(folder, tmp_path, capsys, workers):
    """Also where the signal goes to worker processes too, as torchrun and timeout send it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--method", "none", "--max-iters", "40", "--log-every", "0", "--workers", workers]
    child = command(*words(folder, parts, *more), start_new_session=True)
    for line in child.stdout:
        if "5/40" in line:
            break
    os.killpg(child.pid, signal.SIGTERM)
    said, errors = child.communicate()
    assert child.returncode == 128 + signal.SIGTERM and "--resume" in said and not errors
    assert (parts / "last.pt").exists() and not (parts / "student.pt").exists()
    run(folder, parts, *more, "--resume")
    assert "going on from step" in capsys.readouterr().out
    run(folder, whole, *more)
    assert same(weights(whole), weights(parts))


def test_kill_while_saving_loses_nothing(folder, tmp_path):
    """A process killed inside torch.save leaves the last whole checkpoint, from which to go on."""
    out = tmp_path / "out"
    code = f"""
import os, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import train
save, calls = torch.save, []
def killed(tree, path):
    calls.append(path)
    if len(calls) == 3:
        open(path, "wb").write(b"half")
        os.kill(os.getpid(), 9)
    save(tree, path)
torch.save = killed
train.main(train.get_args(sys.argv[1:]))
"""
    more = ["--method", "none", "--save-every", "0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: the bits depend on it
    done = subprocess.run([sys.executable, "-c", code, *words(folder, out, *more)], env=env)
    assert done.returncode == -signal.SIGKILL
    assert files.load_tensors(out / "last.pt")["step"] == 2
    run(folder, out, *more, "--resume")
    run(folder, tmp_path / "whole", *more)
    assert same(weights(out), weights(tmp_path / "whole"))


@pytest.mark.parametrize("method, accumulate", [("transkd-base+cirkd", 1), ("transkd-ea", 2)])
def test_two_processes_equal_one(folder, tmp_path, method, accumulate):
    """Labels with different numbers of ignored pixels, drops and batch norms included."""
    more = ["--method", method, "--max-iters", "4", "--alone", "--log-every", "0"]
    if accumulate > 1:  # two images a part: larger maps, for batch norms of few values amplify
        more += ["--accumulate", str(accumulate), "--crop-size", "64"]
    logs, metrics, logits = [], [], []
    images = torch.randn(2, 3, 64, 64)
    for out, n in (("one", 1), ("two", 2)):
        out = tmp_path / out
        child = command(*words(folder, out, *more), processes=n)
        said, errors = child.communicate()
        assert child.returncode == 0, errors
        assert said.count("student alone") == 1  # one process speaks
        quiet = ("stage", "img_s", "miou", "pixel_acc")
        logs.append([{k: v for k, v in r.items() if k not in quiet} for r in logged(out)])
        metrics.append(json.loads((out / "metrics.json").read_text()))
        logits += [
            model.load(out / f"{stage}.pt")[0](images).logits for stage in ("alone", "student")
        ]
    assert len(logs[0]) == len(logs[1]) == 15
    for a, b in zip(*logs):
        assert a.keys() == b.keys()
        for k in a:  # cirkd divides cosines by 0.1, which amplifies rounding
            assert a[k] == pytest.approx(b[k], rel=2e-3 if "cirkd" in k else 2e-4), k
    for a, b in zip(logits[:2], logits[2:]):
        assert (a - b).abs().max() < 1e-2 * a.std()
    assert metrics[0]["miou"] == pytest.approx(metrics[1]["miou"], abs=1e-3)
    assert metrics[1]["student"]["images"] == 3  # an odd number, each scored once


def test_a_loss_that_is_not_finite_stops_with_its_name(folder, tmp_path, monkeypatch):
    real = methods.METHODS["kd"].forward

    def broken(self, *a):
        broken.calls += 1
        return {
            k: v * (float("nan") if broken.calls == 3 else 1) for k, v in real(self, *a).items()
        }

    broken.calls = 0
    monkeypatch.setattr(methods.METHODS["kd"], "forward", broken)
    with pytest.raises(UserError, match="student: the loss term 'kd' was not finite at step 2"):
        run(folder, tmp_path / "out", "--method", "kd")
    assert not (tmp_path / "out" / "student.pt").exists()


# ------------------------------------------------------------------------------------------------
# mistakes


def paint(folder, value, stem="p*"):
    """One value all over the labels."""
    for path in (folder / "labels").glob(f"{stem}.png"):
        Image.new("L", (48, 40), value).save(path)


MISTAKES = {
    "no such dataset": (
        ["--dataset", "kitti"],
        None,
        "unknown dataset 'kitti': choose one of scenes",
    ),
    "no such model": (["--student", "b9"], None, "unknown model 'b9': choose one of nano, b0"),
    "no such method": (["--method", "magic"], None, "unknown method 'magic': choose among none"),
    "no data dir": (["--data-dir", "/nowhere"], None, "--data-dir /nowhere: no such folder"),
    "small crop": (["--crop-size", "31"], None, "at least 32"),
    "small side": (["--short-side", "31"], None, "--short-side 31: at least 32, or 0"),
    "no epochs": (["--max-iters", "0"], None, "--max-iters 0: must be 1 to"),
    "negative seed": (["--seed", "-1"], None, "--seed -1: must be 0 to"),
    "ema of 1": (["--ema", "1"], None, "--ema 1.0: must be 0 to 0.99999"),
    "no such device": (["--device", "abacus"], None, "--device abacus: "),
    "binary list": ([], lambda d: (d / "val.txt").write_bytes(b"\xff\xfe"), "not a text file"),
    "crop of the paper": (["--recipe", "paper"], None, "--crop-size has no effect with --recipe"),
    "one image": (["--batch-size", "1"], None, "one image at a time needs a --crop-size of 64"),
    "tiny image": (
        [],
        lambda d: [Image.new("L", (31, 40)).save(d / k / "p2.png") for k in ("images", "labels")],
        "p2.png: 31x40, 32x32 is the smallest",
    ),
    "odd batch": (["--batch-size", "3", "--accumulate", "2"], None, "does not divide"),
    "useless flag": (
        ["--method", "none", "--embed", "2"],
        None,
        "--embed has no effect on --method none",
    ),
    "no teacher": (["--teacher-ckpt", "/nowhere.pt"], None, "/nowhere.pt: no such file"),
    "no weights": (["--student-init", "/nowhere.pt"], None, "/nowhere.pt: no such file"),
    "auto is for teachers": (["--student-init", "auto"], None, "auto: no such file"),
    "untaught": (
        ["--method", "none", "--teacher-ckpt", "/nowhere.pt"],
        None,
        "--teacher-ckpt has no effect with --method none",
    ),
    "alone already": (["--method", "none", "--alone"], None, "--alone has no effect with --method"),
    "two teachers": (
        ["--teacher-ckpt", "/nowhere.pt", "--teacher", "b5"],
        None,
        "--teacher has no effect with --teacher-ckpt",
    ),
    "a trained teacher's rate": (
        ["--teacher-ckpt", "/nowhere.pt", "--teacher-lr", "0"],
        None,
        "--teacher-lr has no effect with --teacher-ckpt",
    ),
    "files of drawn scenes": (["--dataset", "scenes"], None, "--data-dir has no effect with the d"),
    "kd of nothing": (["--method", "kd", "--kd-weight", "0"], None, "kd: --kd-weight 0: nothing"),
    "nothing of transkd": (
        ["--feature-weight", "0", "--embed-weight", "0"],
        None,
        "feature maps and embeddings both left out: there is nothing",
    ),
    "no label": ([], lambda d: (d / "labels/p1.png").unlink(), "1 of 6 have no label: p1"),
    "no image": ([], lambda d: (d / "images/p7.png").unlink(), "1 of 3 have no image: p7"),
    "no stems": (
        [],
        lambda d: (d / "val.txt").write_text("p6.png\np7.png"),
        "val.txt: 2 of 2 have no image: p6.png, p7.png; write p6, without folder and suffix",
    ),
    "out is a file": (["--out-dir", __file__], None, "test_train.py is a file, not a folder"),
    "unreadable": ([], lambda d: (d / "images/p1.png").write_bytes(b""), "p1.png: cannot be read"),
    "empty split": ([], lambda d: (d / "val.txt").write_text("\n"), "the val split is empty"),
    "two columns": (
        [],
        lambda d: (d / "val.txt").write_text("images/p6.png\tlabels/p6.png\nimages/p7.png"),
        "write p6, without folder and suffix",
    ),
    "one name twice": (
        [],
        lambda d: (d / "classes.txt").write_text("a\nb 1 2 3\nb"),
        "classes.txt: classes 1 and 2 have the same name, 'b'",
    ),
    "no colour": (
        [],
        lambda d: (d / "classes.txt").write_text("a\nb 1 2 300"),
        "classes.txt: 'b 1 2 300': red, green and blue are 0 to 255",
    ),
    "comment": (
        [],
        lambda d: (d / "classes.txt").write_text("# name\na\nb"),
        "'# name' would be class 0",
    ),
    "no list": ([], lambda d: (d / "train.txt").unlink(), "train.txt: no such file"),
    "out of range": (
        [],
        lambda d: Image.new("L", (48, 40), 7).save(d / "labels/p2.png"),
        "p2.png: label values 7 are not classes of this data set; allowed are 0 to 2, 255",
    ),
    "void all over": (
        [],
        lambda d: paint(d, 255),
        "the labels of the training images are void all over: of no use; see what",
    ),
    "void for the student": (
        ["--student-images", "1"],
        lambda d: paint(d, 255, stem="p0"),
        "the labels of the student's images are void all over",
    ),
    "void validation": (
        [],
        lambda d: [paint(d, 255, stem=f"p{i}") for i in (6, 7, 8)],
        "the labels of the validation images are void all over",
    ),
    "scale without end": (["--scale", "1", "inf"], None, "two numbers from 0.01 to 100"),
    "too many workers": (["--workers", "1000000"], None, "--workers 1000000"),
    "sizes differ": (
        [],
        lambda d: Image.new("L", (40, 40), 1).save(d / "labels/p2.png"),
        "p2.png: 40x40, but its image",
    ),
    "too many classes": (
        [],
        lambda d: (d / "classes.txt").write_text("thing\n" * 256),
        "256 classes, 1 to 255 are possible",
    ),
}


def with_and_without_cache(mistakes):
    """(name, --cache): all mistakes with it, those that lie in the files without it too."""
    return [(name, "on") for name in mistakes] + [
        (name, "off") for name, (_, change, _) in mistakes.items() if change
    ]


def test_masks_of_0_and_255_are_told(folder, tmp_path, capsys):
    """Without a list of classes they are one class and void: nothing can be learned."""
    (folder / "classes.txt").unlink()
    paint(folder, 0)
    for path in (folder / "labels").iterdir():
        label = np.asarray(Image.open(path)).copy()
        label[:, 10:] = 255
        Image.fromarray(label).save(path)
    run(folder, tmp_path / "out", "--method", "none")
    said = capsys.readouterr().out
    assert "!!! the labels of the student's images know one class only, 'class 0'" in said


def test_labels_of_one_class_are_told(folder, tmp_path, capsys):
    paint(folder, 1)
    run(folder, tmp_path / "out", "--method", "none")
    said = capsys.readouterr().out
    assert "!!! the labels of the student's images know one class only, 'thing 1'" in said


@pytest.mark.parametrize("name, cache", with_and_without_cache(MISTAKES))
def test_mistakes(folder, tmp_path, name, cache):
    more, change, message = MISTAKES[name]
    if change:
        change(folder)
    with pytest.raises(UserError) as e:
        run(folder, tmp_path / "out", "--cache", cache, *more)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.glob("out/*.pt"))  # before any training


OF_A_TEACHER = ("init x", "lr 1", "iters 5", "batch-size 4")


@pytest.mark.parametrize(
    "given, idle",
    [
        (
            "--dataset folder --recipe paper",
            ("--short-side 64", "--crop-size 64", "--scale 1 1", "--warmup 0"),
        ),
        ("--method none", ("--teacher b2", *(f"--teacher-{flag}" for flag in OF_A_TEACHER))),
        ("--teacher-ckpt x", [f"--teacher-{flag}" for flag in OF_A_TEACHER]),
        ("--dataset scenes", ("--cache-dir c", "--cache-gb 1", "--short-side 64")),
    ],
)
def test_flags_without_effect(given, idle):
    for flag in idle:
        with pytest.raises(UserError, match=f"{flag.split()[0]} has no effect with "):
            train.resolve(train.get_args([*given.split(), *flag.split()]))


def test_numbers_that_are_too_small_or_large():
    above_0 = "max-iters teacher-iters batch-size teacher-batch-size accumulate student-images"
    above_0 += " student-labels label-stride eval-batch-size"
    others = "lr teacher-lr weight-decay clip colour eval-every save-every log-every cache-gb ema"
    bad = [f"{flag} 0" for flag in above_0.split()] + [f"{flag} -1" for flag in others.split()]
    for words_ in (*bad, "warmup 1.1", "short-side 9999", "workers 257"):
        where = ["--dataset", "folder", "--data-dir", "d"]
        flag, value = words_.split()
        with pytest.raises(UserError, match=f"--{flag} {value}.*: must be "):
            train.resolve(train.get_args([*where, f"--{flag}", value]))


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    folder = write_folder(tmp_path / "data")
    (folder / "labels/p1.png").unlink()
    child = command(*words(folder, tmp_path / "out"))
    _, errors = child.communicate()
    assert child.returncode == 2
    assert errors.startswith("error: ") and errors.count("\n") == 1 and "p1" in errors


def test_an_error_in_two_processes_leaves_none_of_them_waiting(folder, tmp_path):
    argv = words(folder, tmp_path / "out", "--teacher-init", str(tmp_path / "nothing.pth"))
    child = command(*argv, processes=2)
    _, said = child.communicate(timeout=120)
    assert child.returncode != 0 and "nothing.pth: no such file" in said


def test_teacher_from_imagenet_weights(folder, tmp_path, capsys, monkeypatch):
    """auto: from the hub, here a folder of its kind; its rate is one for fine tuning."""
    net = model.build("b0", 2)
    torch.save(nvlabs(net.encoder.state_dict(prefix="encoder."), prefix=""), tmp_path / "b0.pth")
    asked = []

    def fetch(name):
        asked.append(name)
        return tmp_path / "b0.pth"

    monkeypatch.setattr(train.model.weights, "fetch_from_hub", fetch)
    argv = words(folder, tmp_path / "out", "--teacher", "b0", "--lr", "0.01", "--log-every", "0")
    train.main(train.get_args([*argv, "--teacher-iters", "3", "--teacher-batch-size", "2"]))
    said = capsys.readouterr().out
    assert asked == ["nvidia/mit-b0"] and "starts from nvidia/mit-b0" in said
    assert "3 steps of 2, from 6 images" in said and "6 steps of 4, from 6 images" in said
    n = len(net.encoder.state_dict())
    assert "SCRATCH" not in said and f"loaded {n} of {len(net.state_dict())} tensors" in said
    rates = {line["stage"]: line["lr"] for line in logged(tmp_path / "out") if "lr" in line}
    assert rates["teacher"] < 1e-4 < rates["student"]
    run(folder, tmp_path / "low", "--teacher", "b0", "--lr", "1e-5", "--max-iters", "1")
    line = logged(tmp_path / "low")[0]  # a lower --lr holds for both
    assert line["stage"] == "teacher" and line["lr"] == 1e-5


def test_on_drawn_scenes_a_teacher_starts_from_scratch(monkeypatch, capsys):
    monkeypatch.setattr(train.model.weights, "fetch_from_hub", None)  # nothing is asked
    run_ = Namespace(state=None, inits={}, rank=0, dataset=Namespace(name="scenes"), print=print)
    assert train.start_from(run_, "teacher", model.build("b0", 3), "auto") == "scratch"
    assert capsys.readouterr().out == "starts from scratch\n"


def test_teacher_of_the_transkd_release(tmp_path):
    """20 outputs, images without mean and std: distilled, its logits too, into 19 classes."""
    root = write_folder(tmp_path / "data", classes=19)
    state = nvlabs(model.build("nano", 20).state_dict(), "student.", "student.")
    torch.save(state, tmp_path / "release.pth")
    more = ("--teacher-ckpt", str(tmp_path / "release.pth"), "--method", "transkd-base+kd")
    metrics = run(root, tmp_path / "out", *more)
    assert metrics["student"]["miou"] is not None and len(metrics["teacher"]["iou"]) == 19
    assert model.load(tmp_path / "out/student.pt")[0].num_classes == 19


def test_a_teacher_with_another_head_is_counted_as_it_is(folder, tmp_path):
    net = model.build("nano", 3, head_width=24)
    model.save(tmp_path / "t.pt", net, void=None)
    metrics = run(folder, tmp_path / "out", "--teacher-ckpt", str(tmp_path / "t.pt"))
    assert metrics["teacher"]["params"] == model.count_parameters(net)
    assert metrics["student"]["params"] > metrics["teacher"]["params"]


def test_checkpoints_of_another_kind(folder, tmp_path, capsys):
    out = tmp_path / "out"
    run(folder, out, "--method", "none", "--save-every", "0")
    with pytest.raises(UserError, match="last.pt: the state of a run; pass the run's student.pt"):
        model.load(out / "last.pt")
    other = write_folder(tmp_path / "other", classes=2)
    with pytest.raises(UserError, match="predicts 3 classes, folder has 2.*--teacher-init") as e:
        run(other, tmp_path / "b", "--teacher-ckpt", str(out / "student.pt"))
    instead = str(e.value).split("pass ")[1].removesuffix(" instead").split()
    assert run(other, tmp_path / "d", *instead)["teacher"]["steps"] > 0
    names = "\n".join(["Thing_1", "thing 0", "thing 2"])
    (folder / "classes.txt").write_text(names)
    with pytest.raises(UserError, match="in another order: its class 0 is 'thing 0', that of fol"):
        run(folder, tmp_path / "b", "--teacher-ckpt", str(out / "student.pt"))
    (folder / "classes.txt").write_text("thing 0\nthing 1\nother")
    run(folder, tmp_path / "b", "--teacher-ckpt", str(out / "student.pt"))
    assert "!!!" in capsys.readouterr().out
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="text.pt: not a checkpoint of tensors"):
        run(folder, tmp_path / "c", "--teacher-ckpt", str(tmp_path / "text.pt"))
    with pytest.raises(UserError, match=f"nor shards of them.; pass {out}/student.pt"):
        run(folder, tmp_path / "c", "--teacher-ckpt", str(out))


def test_one_run_at_a_time_in_a_folder(folder, tmp_path):
    """And none is kept out by one that was killed."""
    code = "import loop, pathlib, sys; loop.claim(pathlib.Path(sys.argv[1]), 0); print(); input()"
    argv = [sys.executable, "-c", code, str(tmp_path / "out")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(argv, **pipes, env=os.environ | {"PYTHONPATH": str(ROOT)}) as other:
        other.stdout.readline()
        for more in ([], ["--resume"]):
            with pytest.raises(UserError, match="out: another run is at work there: pass another"):
                run(folder, tmp_path / "out", *more)
        other.kill()
    (tmp_path / "out/last.pt.tmp123").touch()
    run(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tmp*"))


@pytest.mark.parametrize("locks", ["unavailable", "unknown"])
def test_where_no_file_can_be_locked_runs_go_on(tmp_path, monkeypatch, locks):
    def refuse(*a):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(loop.fcntl, "lockf", refuse)
    if locks == "unknown":  # as on Windows
        monkeypatch.setattr(loop, "fcntl", None)
    loop.claim(tmp_path / "out", 0)
    assert (tmp_path / "out").is_dir()


def test_a_run_killed_before_it_saved(folder, tmp_path, capsys):
    out, more = tmp_path / "out", ["--method", "none", "--max-iters", "1"]
    out.mkdir()
    (out / "log.jsonl").write_text('{"stage": "student", "step": 1, "ce": 5.0}\n')
    with pytest.raises(UserError, match="out holds a run .log.jsonl.: pass --resume"):
        run(folder, out, *more)
    run(folder, out, *more, "--resume")
    assert "nothing to resume, starting from the beginning" in capsys.readouterr().out
    assert [r["ce"] for r in logged(out) if "ce" in r] != [5.0] and len(logged(out)) == 2
    shutil.copy(out / "student.pt", out / "last.pt")
    with pytest.raises(UserError, match="last.pt: not the state of a run"):
        run(folder, out, *more, "--resume")


def test_a_run_is_not_overwritten_nor_resumed_as_another(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, out, "--method", "none")
    before = (out / "student.pt").read_bytes()
    with pytest.raises(UserError, match="holds a run .last.pt.: pass --resume"):
        run(folder, out, "--method", "none")
    with pytest.raises(UserError, match="--resume: --lr was 0.0006, now it is 0.1"):
        run(folder, out, "--method", "none", "--lr", "0.1", "--resume")
    moved = "--device cuda --compile --graphs --cache-dir c --cache-gb 1".split()
    here, there = (train.get_args(words(*w)) for w in (("d", "o"), ("D", "O", *moved)))
    assert recorded(here) == recorded(there)
    free = "--workers 1 --eval-every 2 --eval-batch-size 1 --save-every 0 --log-every 0".split()
    run(folder, out, "--method", "none", "--cache", "off", *free, "--resume")
    assert (out / "student.pt").read_bytes() == before
    (out / "last.pt").unlink()
    with pytest.raises(UserError, match="holds student.pt but no last.pt to go on from"):
        run(folder, out, "--method", "none", "--resume")
    assert (out / "student.pt").read_bytes() == before and (out / "log.jsonl").exists()


def test_a_run_goes_on_with_its_own_data_only(folder, tmp_path, monkeypatch):
    out, score = tmp_path / "out", train.score

    def stop(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, "--method", "none", "--save-every", "0")
    monkeypatch.setattr(train, "score", score)
    lines = (folder / "train.txt").read_text()
    (folder / "train.txt").write_text("p0\np1\np2\np3")
    with pytest.raises(UserError, match="the data are others: train was 6, now it is 4"):
        run(folder, out, "--method", "none", "--save-every", "0", "--resume")
    (folder / "train.txt").write_text(lines)
    (folder / "classes.txt").write_text("a\nb\nc\nd")
    with pytest.raises(UserError, match="classes was 3 .thing 0, .*, now it is 4 .a, b, c, d."):
        run(folder, out, "--method", "none", "--save-every", "0", "--resume")
    both = "--resume: --lr was 0.0006, now it is 0.1; the data are others: classes was 3"
    with pytest.raises(UserError, match=both):
        run(folder, out, "--method", "none", "--save-every", "0", "--resume", "--lr", "0.1")
    (folder / "classes.txt").write_text("thing 0\nthing 1\nthing 2")
    label = folder / "labels/p1.png"
    before = label.read_bytes()
    Image.new("L", (48, 40), 1).save(label)
    with pytest.raises(UserError, match="the data are others: checksum of names and sizes was "):
        run(folder, out, "--method", "none", "--save-every", "0", "--resume")
    label.write_bytes(before)
    elsewhere = folder.rename(tmp_path / "moved")
    run(elsewhere, out, "--method", "none", "--save-every", "0", "--resume")


def test_no_space_left_keeps_the_last_checkpoint(folder, tmp_path, monkeypatch):
    out, save, calls = tmp_path / "out", torch.save, []

    def full(tree, path):
        calls.append(path)
        if len(calls) > 2:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        save(tree, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="no space left on the device that holds .*last.pt"):
        run(folder, out, "--method", "none", "--save-every", "0")
    monkeypatch.undo()
    assert files.load_tensors(out / "last.pt")["step"] == 2
    assert not [p for p in out.iterdir() if ".tmp" in p.name]
    run(folder, out, "--method", "none", "--save-every", "0", "--resume")


def test_a_log_cut_off_by_a_crash_can_be_resumed(folder, tmp_path):
    more = ["--method", "none", "--save-every", "0"]
    run(folder, tmp_path / "out", *more)
    with open(tmp_path / "out" / "log.jsonl", "a") as f:
        f.write('{"stage": "stud')
    run(folder, tmp_path / "out", *more, "--resume")
    assert {line["stage"] for line in logged(tmp_path / "out")} == {"student"}


def test_steps_after_the_saved_one_are_logged_once(folder, tmp_path):
    more = ["--method", "none", "--save-every", "0", "--log-every", "0"]
    with crash("student", 3):
        run(folder, tmp_path, *more)
    with open(tmp_path / "log.jsonl", "a") as f:  # as if the crash had come a step later
        f.write('{"stage": "student", "step": 4, "ce": 1.0, "lr": 0.1}\n')
    run(folder, tmp_path, *more, "--resume")
    assert [step for _, step, miou in log_of(tmp_path) if miou is None] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_while_waiting_is_quiet(folder, tmp_path):
    more = "--method none --max-iters 100000 --log-every 0".split()
    child = command(*words(folder, tmp_path / "out", *more))
    time.sleep(0.1)
    for line in child.stdout:
        if "img/s" in line:
            break
    child.send_signal(signal.SIGINT)
    said, errors = child.communicate()
    assert child.returncode == 128 + signal.SIGINT and "Traceback" not in errors
    assert "the same with --resume goes on" in said and (tmp_path / "out/last.pt").exists()
