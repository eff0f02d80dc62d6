"""What a training run does step by step, against a few lines of plain torch."""

from argparse import Namespace

import gpu
import graphs
import pytest
import torch
import torch.nn.functional as F
from test_train import logged, run, weights, words

import augment
import loop
import model
import settings
import train
from files import UserError
from step import Graphed, Teacher, update

MORE = "--seed 1 --method none --class-weights paper --crop-size 64 --max-iters 3 --lr 1e-2"
MORE += " --warmup 0.34"
NORM = torch.nn.modules.batchnorm._BatchNorm
TINY_CLIP = 1e-5  # gradients as small as AdamW's epsilon: none counts by its sign alone


def open_run(folder, out, *more):
    args = train.get_args(words(folder, out, *more))
    train.resolve(args)
    return train.open_run(args)


def plain_steps(run_, rates, clip):
    """Weighted cross-entropy of all parts of a batch, clip, AdamW, a step a rate: the net's tensors
    and the norms of the gradients."""
    args, norms = run_.args, []
    torch.manual_seed(args.seed)
    net = model.build("nano", 3).to(memory_format=torch.channels_last).train()
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [dict(params=matrices), dict(params=others, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, lr=1, weight_decay=args.weight_decay)
    labels = [torch.tensor(run_.train.label(i)).flatten() for i in range(len(run_.train))]
    pixels = torch.cat(labels).bincount(minlength=256)[:3]
    class_weights = 1 / torch.log(1.10 + pixels / pixels.sum())
    part = args.batch_size // args.accumulate
    batches = augment.Batches(run_.train, part, args.seed, run_.augment)
    for step, rate in enumerate(rates):
        parts = [batches[step * args.accumulate + k] for k in range(args.accumulate)]
        labels = [part["label"].long() for part in parts]
        counts = [class_weights[y[y != 255]].sum() for y in labels]
        assert len(parts) == 1 or counts[0] != counts[1]
        for k, part in enumerate(parts):
            images, _ = augment.device_batch(part, "cpu", run_.facts["mean"], run_.facts["std"])
            torch.manual_seed(hash((args.seed, step, k)))
            logits = F.interpolate(net(images).logits, size=labels[k].shape[1:], mode="bilinear")
            weighted = dict(weight=class_weights, ignore_index=255, reduction="sum")
            (F.cross_entropy(logits, labels[k], **weighted) / sum(counts)).backward()
        norm = sum(p.grad.square().sum() for p in net.parameters()).sqrt()
        norms.append(norm.item())
        for p in net.parameters():
            p.grad *= clip / norm
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict(), norms


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_plain_torch(accumulate, folder, tmp_path, monkeypatch):
    norms, real = [], loop.update

    def spy(learner, *more, **options):
        grads = [p.grad for p in learner.parameters()]
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
        real(learner, *more, **options)

    monkeypatch.setattr(loop, "update", spy)
    more = f"{MORE} --weight-decay 0.1 --clip {TINY_CLIP} --accumulate {accumulate}".split()
    run_ = open_run(folder, tmp_path / "a", *more)
    want, want_norms = plain_steps(run_, [5e-3, 1e-2, 5e-3], TINY_CLIP)
    run(folder, tmp_path / "a", *more)
    assert norms == pytest.approx(want_norms, rel=1e-3)
    torch.manual_seed(1)
    start, got = model.build("nano", 3).state_dict(), weights(tmp_path / "a")
    assert got["head.norm.num_batches_tracked"] == 3 * accumulate
    names = [name for name in want if "num_batches" not in name and "running" not in name]
    for kind in (1, 2):  # vectors, which do not decay, and matrices
        pick = [name for name in names if (want[name].ndim > 1) == (kind > 1)]
        w, g, s = (torch.cat([x[name].flatten() for name in pick]) for x in (want, got, start))
        assert (g - w).norm() < 0.01 * (w - s).norm()


test_a_replayed_step = gpu.test_a_replayed_step  # with a stand-in for what a GPU has


@pytest.mark.parametrize(
    "flags",
    ["", "--accumulate 2", "--ema 0.9 --eval-every 2"]
    + ["--dtype float16 --accumulate 2", "--dtype bfloat16 --ema 0.9"],
)
def test_a_training_of_recorded_steps_is_the_same(folder, tmp_path, monkeypatch, flags):
    flags = ["--method", "none", "--max-iters", "7", *flags.split()]
    run(folder, tmp_path / "a", *flags)
    graphs.without_gpu(monkeypatch)
    replayed, real = [], loop.start

    class Counted(torch.cuda.CUDAGraph):
        def replay(self):
            replayed.append(self)
            super().replay()

    def start(args, *more):  # which would want a GPU
        common = real(args, *more)
        args.graphs = True
        return common

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    monkeypatch.setattr(loop, "start", start)
    run(folder, tmp_path / "b", *flags)
    want, got = (
        torch.cat([x.float().flatten() for x in weights(tmp_path / name).values()]) for name in "ab"
    )
    assert (got - want).norm() < 1e-4 * want.norm()
    assert len(replayed) == 7 * (2 if "--accumulate" in flags else 1) - Graphed.WARM_UP


def test_nothing_to_compile_with(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="--compile needs a C.. compiler: no no-such-compiler"):
        run(folder, tmp_path / "a", "--compile")
    assert not (tmp_path / "a").exists()


def out_of_memory(*a):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_cannot_be_recorded(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--graphs: CUDA graphs are for a GPU"):
        run(folder, tmp_path / "a", "--graphs")
    graphs.without_gpu(monkeypatch)
    call = Graphed(lambda x: {"a": x / x.sum().item()}, "cpu")
    for _ in range(Graphed.WARM_UP):
        call(torch.ones(2))
    with pytest.raises(UserError, match="not permitted.*: do without --graphs"):
        call(torch.ones(2))
    left = Graphed.WARM_UP * [{}]
    call = Graphed(lambda: left.pop() if left else torch.empty(1 << 60), "cpu")
    for _ in range(Graphed.WARM_UP):
        call()
    monkeypatch.setattr(torch, "empty", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):  # which is no fault of --graphs
        call()


def test_recipe_paper_decays_everything_and_changes_the_rate_once_an_epoch(
    folder, tmp_path, monkeypatch
):
    seen = []
    real = loop.run_steps

    def spy(run, stage, parts, batches, prepare, frozen, schedule, *more):
        seen.append((schedule, parts["optimizer"].param_groups))
        return real(run, stage, parts, batches, prepare, frozen, schedule, *more)

    monkeypatch.setattr(loop, "run_steps", spy)
    monkeypatch.setattr(settings, "fast_dtype", lambda device: "bfloat16")
    small = "--student nano --teacher nano --recipe paper --method kd --max-iters 1".split()
    small += "--dataset folder --teacher-batch-size 2 --student-images 4 --student-labels 2".split()
    where = ["--data-dir", str(folder), "--out-dir", str(tmp_path / "out")]
    args = train.get_args([*small, *where])
    train.main(args)
    # steps of 2 through the teacher's 6 images and the student's 4, labelled or not
    assert [schedule["paper_epoch"] for schedule, _ in seen] == [3, 2]
    assert all(len(groups) == 1 and groups[0]["weight_decay"] == 0.01 for _, groups in seen)
    assert args.dtype == "float32"


def test_a_teachers_void_is_cut_off():
    net = model.build("nano", 4).eval()
    facts = dict(mean=[0.0] * 3, std=[1.0] * 3, void=3)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = net(images).logits[:, :3]
    assert torch.equal(Teacher(net, facts, facts["mean"], facts["std"], True)(images).logits, want)
    assert Teacher(net, facts, facts["mean"], facts["std"])(images).logits is None


@pytest.mark.parametrize("name, synced", [("nano", False), ("nano", True), ("fcn_resnet50", False)])
def test_a_bfloat16_teacher_is_a_copy_that_keeps_no_float32_but_in_batch_norms(name, synced):
    """Nor if it was trained by several processes on GPUs, and so has their norms."""
    torch.manual_seed(0)
    net, (mean, std) = model.build(name, 4).eval(), ([0.0] * 3, [1.0] * 3)
    for m in net.modules():
        if isinstance(m, NORM):
            m.running_var.uniform_(0.5, 2)
    if synced:
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    facts, images = dict(mean=mean, std=std, void=None), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = net(images)
    look = Teacher(net, facts, mean, std, True, "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        out = look(images)
    for part in ("features", "embeddings"):
        for x, y in zip(getattr(out, part), getattr(want, part)):
            assert x.dtype == torch.bfloat16 and y.dtype == torch.float32
            assert 0 < (x - y).norm() < 0.02 * y.norm()
    assert 0 < (out.logits - want.logits).norm() < 0.02 * want.logits.norm()
    norms = [m for m in net.modules() if isinstance(m, NORM)]
    copies = [m for m in look.net.modules() if isinstance(m, NORM)]
    assert norms and len(copies) == len(norms)
    for kept, norm in zip(copies, norms):
        assert kept is not norm
        for key, x in norm.state_dict().items():
            assert kept.state_dict()[key].dtype == x.dtype and kept.state_dict()[key].equal(x)
    low = [p for p in look.parameters() if p.dtype == torch.bfloat16]
    assert len(low) + 2 * len(norms) == len([*net.parameters()])
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_loss_of_float16_is_scaled(folder, tmp_path, dtype):
    run_ = open_run(folder, tmp_path / "out", "--dtype", dtype)
    scaler = loop.trained_parts(run_, torch.nn.Linear(2, 2), None, 0.1)["scaler"]
    assert (scaler.scale(torch.ones(())) > 1) == (dtype == "float16")


def a_log(folder, accumulate=1, batch_size=8):
    args = Namespace(accumulate=accumulate, log_every=4)
    run_ = loop.Run(args=args, out=folder, device=torch.device("cpu"))
    return loop.TrainingLog(run_, "student", total=20, batch_size=batch_size)


def test_lines_tell_means_speed_and_what_is_left(tmp_path, monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(loop.time, "time", lambda: clock[0])
    log = a_log(tmp_path, accumulate=2)
    log.begin(4)  # resumed

    def steps(*values):  # two parts a step
        for k, value in enumerate(values):
            log.add(k // 2, dict(ce=torch.tensor(value)))

    steps(1.0, 3.0, 5.0, 7.0)
    clock[0] += 3
    with log.paused():
        clock[0] += 50
    assert not log.due(5)
    clock[0] += 1
    assert log.due(5)
    log.report(5, 0.1)  # two steps of 8 in 4 seconds; 14 are left
    steps(10.0, 20.0)
    clock[0] += 1
    log.report(6, 0.1)  # one step in 1 second; 3 steps in 5 seconds, 13 are left
    lines = [(r["step"], r["ce"], r["img_s"]) for r in logged(tmp_path)]
    assert lines == [(6, 4.0, 4.0), (7, 15.0, 8.0)]
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("eta 0:28") and said[1].endswith("eta 0:22")
    assert log.seconds() == 5.0 and not log.due(7) and log.due(19)  # the last
    assert [loop.clock(s) for s in (59.4, 61, 3723)] == ["0:59", "1:01", "1:02:03"]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_the_first_step_at_which_a_term_was_not_finite_is_told(tmp_path, value):
    log = a_log(tmp_path)
    log.begin(0)
    for step, kd in enumerate((1.0, 2.0, value, 3.0, value)):
        log.add(step, dict(ce=torch.tensor(1.0), kd=torch.tensor(kd)))
    for look in (log.check, lambda: log.due(4)):  # on a CPU at every step
        with pytest.raises(UserError, match="'kd' was not finite at step 2"):
            look()


def test_terms_that_come_and_go_would_be_added_to_each_other(tmp_path):
    log = a_log(tmp_path)
    log.add(0, dict(ce=torch.tensor(1.0)))
    with pytest.raises(UserError, match="the loss terms were ce, in step 1 ce, x: every step"):
        log.add(1, dict(ce=torch.tensor(1.0), x=torch.tensor(2.0)))


def test_what_is_clipped_are_the_gradients_and_not_the_scaled_ones():
    def flat(tensors):
        return torch.cat([x.detach().flatten() for x in tensors])

    torch.manual_seed(0)
    net, x = torch.nn.Linear(5, 3), torch.randn(4, 5)
    start = flat(net.parameters())
    g = flat(torch.autograd.grad(net(x).square().sum(), net.parameters()))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(net(x).square().sum()).backward()
    update(net, optimizer, scaler, 0.5 * g.norm().item())
    assert torch.allclose(flat(net.parameters()), start - 0.5 * g, atol=1e-5)
    assert all(p.grad is None for p in net.parameters())
    scaler.scale(net(x).square().sum()).backward()
    before = [p.grad for p in net.parameters()]
    update(net, optimizer, scaler, 0, keep=True)
    for p, grad in zip(net.parameters(), before):
        assert p.grad is grad and not grad.any()


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot write .*log.jsonl: Is a directory"):
        a_log(tmp_path).run.log(step=1)
