"""
What a GPU computes, beside the CPU. Not run by `python -m pytest`, for most machines have none:

    python -m pytest tests/gpu.py

Without a GPU it compares the CPU with itself. float32 is compared without TF32.
"""

import json
import os
import signal

import graphs
import pytest
import torch
import torch.distributed as dist
from conftest import write_folder, write_photos

import augment
import catalog
import data
import eval as evaluation
import loop
import methods
import model
import parallel
import pretrain
import settings
import train
from step import Graphed, Learner, Teacher, update

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MINE = (model.IMAGENET_MEAN, model.IMAGENET_STD)
FACTS = dict(mean=MINE[0], std=MINE[1], void=None)


@pytest.fixture(autouse=True)
def whole_float32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), train=12, val=4, height=96, width=128)


def run(place, out, *more, device=GPU):
    """metrics.json of a short training."""
    argv = ["--dataset", "folder", "--data-dir", place, "--out-dir", out, "--student", "nano"]
    argv += ["--crop-size", "96", "128", "--batch-size", "4", "--lr", "3e-3", "--device", device]
    more = ["--max-iters", "60", "--method", "none", *more]
    train.main(settings.get_args([*map(str, argv), *more]))
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """A net trained on the CPU, images that it has not seen, and the file that holds it."""
    out = tmp_path_factory.mktemp("out") / "run"
    run(place, out, device="cpu")
    net, facts = model.load(out / "student.pt")
    split = data.open_split(catalog.open_dataset("folder", place), "val", cache="off")
    images = [evaluation.prepare(split.image(i), facts) for i in range(len(split))]
    return net, torch.cat(images), out / "student.pt"


@pytest.mark.parametrize("variant", ["float32", "channels_last", "bfloat16", "compiled"])
def test_logits_of_a_trained_net(trained, variant):
    net, images, path = trained
    with torch.inference_mode():
        want = net(images).logits
    net = model.load(path)[0].to(GPU)
    images = images.to(GPU)
    if variant != "float32":
        net = net.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if variant == "compiled":
        net.compile()
    dtype = "bfloat16" if variant == "bfloat16" else "float32"
    with torch.inference_mode(), evaluation.autocast(GPU, dtype):
        got = net(images).logits.float().cpu()
    bound = 3e-2 if dtype == "bfloat16" else 1e-4
    assert (got - want).abs().max() < bound * want.abs().max()
    assert (got.argmax(1) == want.argmax(1)).float().mean() > 0.98


def test_scores_are_the_same(trained, place):
    net, facts = model.load(trained[2])
    split = data.open_split(catalog.open_dataset("folder", place), "val", cache="off")
    want = evaluation.evaluate(net, split, facts)
    got = evaluation.evaluate(net.to(GPU), split, facts, GPU)
    for key in ("miou", "pixel_acc", "boundary_iou"):
        assert got[key] == pytest.approx(want[key], abs=1e-3)


def step(spec, device, dtype="float32", wrap=lambda learner: learner):
    """Loss terms and the gradient of student and adapters, of a step without random drops."""
    torch.manual_seed(0)
    teacher, student = model.build("b0", 6).eval(), model.build("nano", 6, drop_path=0, dropout=0)
    learner = Learner(student, methods.build(spec, student, teacher)).train()
    images = torch.randn(4, 3, 64, 96).to(device)
    labels = torch.randint(0, 6, (4, 64, 96), dtype=torch.uint8).to(device)
    look = Teacher(teacher, FACTS, *MINE, learner.method.needs_head, dtype).to(device)
    taught, learner = learner.method.needs_teacher, wrap(learner.to(device))
    with evaluation.autocast(device, dtype):
        torch.manual_seed(1)
        terms = learner(images, labels, look(images) if taught else None)
    sum(terms.values()).backward()
    grads = [p.grad.flatten() for p in learner.parameters() if p.grad is not None]
    return torch.stack(list(terms.values())).detach().cpu(), torch.cat(grads).cpu()


@pytest.mark.parametrize("spec", [*methods.METHODS, "transkd-base+kd"])
def test_a_step_of_every_method(spec):
    """In float32 as on the CPU; in bfloat16 near it, with gradients that point the same way."""
    want, want_grads = step(spec, "cpu")
    got, grads = step(spec, GPU)
    if spec != "cirkd":  # it draws its samples on the device
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-6), (got, want)
        assert (grads - want_grads).norm() < 1e-2 * want_grads.norm()
    low, grads = step(spec, GPU, "bfloat16")
    assert low.isfinite().all() and grads.isfinite().all()
    if spec != "cirkd":
        assert torch.allclose(low, want, rtol=0.1, atol=0.02), (low, want)
        assert torch.cosine_similarity(grads, want_grads, dim=0) > 0.9


def after_six_steps(spec, recorded, dtype="float32"):
    """Loss terms, gradients, weights and statistics; the last three steps from a graph."""
    torch.manual_seed(0)
    teacher, student = model.build("b0", 6).eval(), model.build("nano", 6)
    few = dict(manifold_rows=8) if spec == "manifold" else {}  # of 24, so that some are drawn
    learner = Learner(student, methods.build(spec, student, teacher, **few)).train().to(GPU)
    look = Teacher(teacher, FACTS, *MINE, learner.method.needs_head, dtype).to(GPU)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(GPU.type, enabled=False)
    grads = []

    def work(images, labels):
        with evaluation.autocast(GPU, dtype):
            seen = look(images) if learner.method.needs_teacher else None
            terms = learner(images, labels, seen)
        sum(terms.values()).backward()
        return {name: term.detach() for name, term in terms.items()}

    call = Graphed(work, GPU) if recorded else work
    generator = torch.Generator().manual_seed(1)
    for k in range(6):
        images = torch.randn(4, 3, 64, 96, generator=generator)
        labels = torch.randint(0, 6, (4, 64, 96), dtype=torch.uint8, generator=generator)
        torch.manual_seed(k)
        terms = call(images.to(GPU), labels.to(GPU))
        grads += [p.grad.flatten().clone() for p in learner.parameters() if p.grad is not None]
        update(learner, optimizer, scaler, clip=1.0, keep=recorded)
    statistics = [b.flatten() for name, b in learner.named_buffers() if "running" in name]
    weights = [p.detach().flatten() for p in learner.parameters()]
    return torch.stack([*terms.values()]), *map(torch.cat, (grads, statistics, weights))


@pytest.mark.parametrize(
    "spec, dtype",
    [(spec, "float32") for spec in [*methods.METHODS, "transkd-base+kd"]]
    + [("transkd-base+kd", "bfloat16")],
)
def test_a_replayed_step(spec, dtype, monkeypatch):
    """It computes what a step does that was not recorded, with the same drops."""
    if GPU.type == "cpu":
        graphs.without_gpu(monkeypatch)
    bound = 1e-3 if dtype == "float32" else 2e-2
    for want, got in zip(after_six_steps(spec, False, dtype), after_six_steps(spec, True, dtype)):
        assert (got - want).norm() < bound * want.norm()


def test_a_batch_is_made_alike(place):
    split = data.open_split(catalog.open_dataset("folder", place), "train", cache="off")
    batch = augment.Batches(split, 4, 0, augment.Augment((64, 96)))[0]
    (x, y), (u, v) = (augment.device_batch(batch, d, *MINE) for d in ("cpu", GPU))
    assert torch.allclose(u.cpu(), x, atol=1e-3) and v.cpu().equal(y)


@pytest.mark.parametrize(
    "flags",
    ["", "--dtype float16", "--dtype float32", "--compile", "--accumulate 2 --ema 0.9"]
    + ["--graphs", "--dtype float16 --graphs", "--graphs --compile", "--graphs --accumulate 2"],
)
def test_a_training_learns(place, tmp_path, flags):
    if GPU.type == "cpu" and "--graphs" in flags:
        pytest.skip("CUDA graphs need a GPU")
    method = "--method transkd-gl --teacher nano --alone"
    got = run(place, tmp_path / "run", *method.split(), *flags.split())
    for stage in ("teacher", "alone", "student"):
        assert got[stage]["miou"] > 0.5
    dtype = flags.split()[1] if "--dtype" in flags else settings.fast_dtype(GPU)
    assert got["settings"]["dtype"] == dtype


def test_an_interrupted_training_goes_on(place, tmp_path, monkeypatch):
    steps, real = [], loop.update

    def interrupted(*args, **options):
        steps.append(args)
        if len(steps) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(loop, "update", interrupted)
    with pytest.raises(SystemExit):
        run(place, tmp_path / "run")
    assert run(place, tmp_path / "run", "--resume")["miou"] > 0.5
    assert len(steps) == 60


@pytest.mark.parametrize("flags", ["", "--compile"])
def test_a_classifier_learns_from_another(tmp_path, flags):
    photos = write_photos(tmp_path / "photos", train=16)
    argv = ["--data-dir", str(photos), "--size", "32", "--batch-size", "8", "--max-iters", "30"]
    argv += ["--lr", "3e-3", "--model", "nano", "--device", str(GPU), "--mixup", "0.8"]
    argv += flags.split()
    pretrain.main(pretrain.get_args([*argv, "--out-dir", str(tmp_path / "a")]))
    argv += ["--teacher", str(tmp_path / "a/encoder.pt"), "--method", "manifold+kd"]
    pretrain.main(pretrain.get_args([*argv, "--out-dir", str(tmp_path / "b")]))
    for name in "ab":
        assert json.loads((tmp_path / name / "metrics.json").read_text())["encoder"]["top1"] > 0.5


def test_one_process_under_ddp_computes_what_it_does_without(monkeypatch):
    """With NCCL and shared batch norms; more processes need more GPUs."""

    def wrap(learner):
        return parallel.wrap(parallel.share_statistics(learner, GPU), GPU)

    want, want_grads = step("transkd-base", GPU)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29517")
    backend = "cuda:nccl,cpu:gloo" if GPU.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1)
    try:
        got, grads = step("transkd-base", GPU, wrap=wrap)
        assert parallel.any_process(True, False) == [True, False]
    finally:
        dist.destroy_process_group()
    assert torch.allclose(got, want, rtol=1e-4)
    assert (grads - want_grads).norm() < 1e-3 * want_grads.norm()
