"""What the faster ways to compute a step may change; what is measured. Never how long it takes."""

import argparse
import copy
import functools
import json
import platform
import resource
import time

import graphs
import numpy as np
import pytest
import torch
from conftest import write_folder
from test_train import run as train

import bench
import catalog
import data
import eval as evaluation
import flops
import methods
import model
import parallel
import timing
from files import UserError

SMALL = "--student nano --teacher nano --models nano --size 64x64 --batch-size 2 --batches 1 2"
SMALL = [*SMALL.split(), "--num-classes", "3", "--seconds", "0.01"]
# largest difference of the logits, as a share of the largest logit. Measured on the net below:
# 1e-6, 1e-6 and 9e-3
BOUNDS = dict(channels_last=1e-5, compiled=1e-5, bfloat16=3e-2)


def options(**other):
    sizes = dict(num_classes=3, size=(64, 64), batch_size=2, workers=0, device="cpu", seconds=0.01)
    nets = dict(student="nano", teacher="nano", method="transkd-base")
    return argparse.Namespace(**sizes | nets | other)


# ------------------------------------------------------------------------------------------------
# correctness is not traded


def compiled_graphs():
    """How many graphs were compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def run(folder, out, *words):
    """60 steps of nano; its mIoU."""
    length = "--method none --max-iters 60 --crop-size 64 --batch-size 8 --lr 3e-3"
    return train(folder, out, *length.split(), *words)["miou"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("bench") / "data", 24, 8, height=80, width=96)


@pytest.fixture(scope="module")
def trained(place):
    """A net that knows its classes, images that it has not seen, and its mIoU on them."""
    miou = run(place, place / "run")
    net, facts = model.load(place / "run/student.pt")
    split = data.open_split(catalog.open_dataset("folder", place), "val", cache="off")
    images = [evaluation.prepare(split.image(i), facts) for i in range(len(split))]
    return net, torch.cat(images), miou


def logits(net, images, dtype="float32"):
    with torch.inference_mode(), evaluation.autocast("cpu", dtype):
        return net(images).logits.float()


@pytest.mark.parametrize("variant", BOUNDS)
def test_logits_of_a_trained_net(trained, variant):
    net, images, miou = trained
    assert miou > 0.5
    want = logits(net, images)
    if variant == "bfloat16":
        got = logits(net, images, "bfloat16")
        assert 0.98 < (got.argmax(1) == want.argmax(1)).float().mean() and not got.equal(want)
    elif variant == "compiled":  # every kind of kernel: three more stages are minutes of C++
        net = copy.deepcopy(net)
        net.encoder.stages[0].compile()
        net.head.compile()
        torch._dynamo.utils.counters.clear()
        got = logits(net, images)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    else:
        net = copy.deepcopy(net).to(memory_format=torch.channels_last)
        got = logits(net, images.contiguous(memory_format=torch.channels_last))
    assert (got - want).abs().max() < BOUNDS[variant] * want.abs().max()


@pytest.mark.parametrize("method", ["transkd-base", "cwd"])
def test_naive_and_lean_compute_the_same_step(method):
    """Loss terms and gradients of the student: else their times could not be compared."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    labels = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    results = []
    for how in ({}, dict(lean=True), dict(lean=True, channels_last=True)):
        learner, run_teacher = bench.build_step(options(), method, **how)
        torch.manual_seed(1)
        terms = learner(images, labels, run_teacher(images))
        sum(terms.values()).backward()
        grads = torch.cat([p.grad.flatten() for p in learner.parameters()])
        results.append((torch.stack(list(terms.values())).detach(), grads))
    for terms, grads in results[1:]:
        assert torch.allclose(terms, results[0][0], rtol=5e-5)  # cwd's small terms: 1e-5
        assert (grads - results[0][1]).norm() < 1e-4 * grads.norm()


def test_naive_keeps_what_lean_leaves_out():
    images = torch.randn(1, 3, 64, 64)
    _, run_teacher = bench.build_step(options(), "transkd-base")
    out = run_teacher(images)
    assert out.logits is not None and out.features[0].requires_grad
    _, run_teacher = bench.build_step(options(), "transkd-base", lean=True)
    out = run_teacher(images)
    assert out.logits is None and not out.features[0].requires_grad
    for lean in (False, True):
        learner, _ = bench.build_step(options(), "none", lean=lean)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            learner.student(images)
        products = any("bmm" in str(op) for op in counter.get_flop_counts()["Global"])
        assert products == (not lean)  # the fused kernel of CPUs counts as none


@pytest.mark.parametrize("variant", [["--dtype", "bfloat16"], ["--compile"]])
def test_a_training_run_ends_where_float32_ends(place, trained, tmp_path, monkeypatch, variant):
    """Within what another seed changes: 0.852 to 0.860 (0 to 3). --compile as it is took 0.843.

    Here without its last part, that is minutes of C++ compiler; the graphs are those.
    """
    whole = torch.nn.Module.compile
    quick = functools.partialmethod(whole, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert run(place, tmp_path / "run", *variant) == pytest.approx(trained[2], abs=0.02)
    assert compiled_graphs() == ("--compile" in variant)  # whole, and none for scoring's other size


def test_compiled_stages_of_unlike_batch_sizes_have_a_graph_for_each_net(
    place, tmp_path, monkeypatch
):
    """A batch of any size would be one graph for both, and cannot be: its maps are resized."""
    quick = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    two = "--compile --teacher nano --method transkd-base --teacher-batch-size 2 --max-iters 2"
    run(place, tmp_path / "run", *two.split(), "--teacher-init", "scratch")
    assert compiled_graphs() == 3  # the teacher that learns, the student, the teacher that teaches


# ------------------------------------------------------------------------------------------------
# the measurements


def hold(n):
    """How much a tensor of n float32 adds to this process's memory, and to its peak once gone."""
    before = timing.memory("cpu", "now")
    x = torch.ones(n)
    held = timing.memory("cpu", "now") - before
    del x
    return held, timing.memory("cpu", "peak") - before


def test_memory_of_a_process_of_its_own():
    ballast = torch.ones(10**8)  # 0.4 GB here, none of it there
    sizes = (10**7,), (5 * 10**7,)
    for (n,), (held, peak) in zip(sizes, timing.in_processes(hold, *sizes)):
        assert held == pytest.approx(4e-9 * n, abs=0.02) and peak == pytest.approx(held, abs=0.02)
    assert timing.memory("cpu", "peak") > 0.4 and len(ballast)


def test_timed_is_the_median_after_the_warm_up(monkeypatch):
    naps = iter([9, 9, 1, 5, 2])
    clock = [0.0]

    def work():
        clock[0] += next(naps)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert timing.timed(work, "cpu", seconds=0, least=3) == 2


def test_stopwatch(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    watch = timing.Stopwatch("cpu")
    for a, b in ((1, 5), (3, 6), (2, 100)):
        watch.mark("start")
        for name, seconds in (("a", a), ("b", b)):
            clock[0] += seconds
            watch.mark(name)
        clock[0] += 1000  # between the last mark and the next start
    assert watch.medians() == dict(a=2, b=6)


def test_peak_is_that_of_large_products():
    """No small product, timed by hand, is twice as fast as `matmul_peak` says is possible."""
    peak, a = timing.matmul_peak("cpu", "float32", seconds=0.1), torch.randn(512, 512)
    a @ a
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    assert 10 * 2 * 512**3 / (time.perf_counter() - start) < 2 * peak


def test_flops_of_a_step():
    """Teacher without its head once, student and adapters three times; 2 a multiply-accumulate."""
    args = options(student="b0", teacher="b2", num_classes=20, size=(512, 1024))
    teacher_flops, whole = bench.step_flops(args)
    cost = flops.with_method("transkd-base", "b0", "b2", 20, args.size)
    student = cost["executed_gmacs"] + cost["attention_gmacs"]
    assert whole - teacher_flops == pytest.approx(3 * 2e9 * student, rel=1e-6)
    b2 = flops.measure_named("b2", 20, args.size)
    dims = model.MODELS["b2"][0]
    head = sum(c * 768 * 512 * 1024 / 16 / 4**i for i, c in enumerate(dims)) / 1e9
    head += (768 * 20 * 512 * 1024 / 16 + sum(768 * 768 * (c + 1) for c in dims)) / 1e9
    want = b2["executed_gmacs"] + b2["attention_gmacs"] - head
    assert teacher_flops == pytest.approx(2e9 * want, rel=1e-3)
    args.method = "none"
    assert bench.step_flops(args)[0] == 0


def test_the_workers_rate_is_that_of_many_batches(monkeypatch):
    """They deliver several at once: the time until the next one says nothing."""
    args = bench.get_args([*SMALL, "--workers", "3", "--batch-size", "2"])
    real, taken = next(bench.loader(args, 2, 0)), []

    def in_a_second(work, *a, **k):
        taken.clear()
        work()
        return 1.0

    monkeypatch.setattr(bench, "loader", lambda *a: iter(lambda: taken.append(1) or real, None))
    monkeypatch.setattr(bench, "timed", in_a_second)
    rates = bench.bench_data(args, {})
    assert len(taken) >= 8 * 3 and rates["workers_img_s"] == 2 * len(taken)


@pytest.mark.parametrize("name", ["lvt", "pvt_v2_b0"])
def test_hugging_face_has_no_such_net(name, capsys):
    assert bench.hugging_face(model.build(name, 5), "cpu") is None and not capsys.readouterr().out


def test_noise_is_a_split():
    split = bench.noise((32, 64), 5, images=3)
    image, label = split.pair(2)
    assert (len(split), image.shape, label.shape) == (3, (64, 128, 3), (64, 128))
    assert label.max() < 5 and image.dtype == label.dtype == np.uint8


# ------------------------------------------------------------------------------------------------
# the command


def command(*words):
    bench.main(bench.get_args([*SMALL, *words]))


def test_everything(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = [str(tmp_path / name) for name in ("b.json", "b.png")]
    monkeypatch.setattr(methods, "METHODS", {"none": methods.METHODS["none"]})
    words = ["--variants", "naive", "--method", "none", "--json", out[0]]
    command(*words, "--plot", out[1], "--only", *bench.SECTIONS)
    tree = json.loads((tmp_path / "b.json").read_text())
    said = capsys.readouterr().out
    assert [r["variant"] for r in tree["step"]] == ["naive"]
    parts = {"data", "teacher", "student", "losses", "backward", "optimiser"}
    for r in tree["step"]:
        assert set(r["parts"]) == parts and 0 < r["memory_gb"] < 2 and 0 < r["utilisation"] < 1
        assert r["seconds"] == pytest.approx(sum(r["parts"].values()), rel=0.7)
    kinds = {r["kind"] for r in tree["inference"]}
    low = {"bfloat16"} if parallel.has_native(torch.device("cpu"), "bfloat16") else set()
    assert {"float32", "transformers, float32", "nano"} | low <= kinds
    assert all(r["seconds"] > 0 for r in tree["inference"])
    assert tree["data"]["host_img_s"] > 0 and set(tree["processes"]) == {"apart", "together"}
    assert list(tree["methods"]) == ["none"]
    assert "naive" in said and "as one run" in said and (tmp_path / "b.png").stat().st_size > 5000


def test_a_recorded_step(monkeypatch, capsys):
    """Of a recorded step, only what is not recorded can be timed by itself."""
    graphs.without_gpu(monkeypatch)
    row = bench.time_step(options(), "transkd-base", "graphs", 2)
    assert row["parts"].keys() == {"data", "replay", "optimiser"}
    monkeypatch.setattr(bench, "time_alone", lambda *_: row)
    bench.bench_step(options(variants=["graphs"]), dict(bfloat16=1e12))
    cells = capsys.readouterr().out.splitlines()[-1].split()
    assert cells[0] == "graphs" and cells[4:8] == ["-"] * 4 and cells[-2] == "-"


@pytest.mark.parametrize(
    "error, said",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "out of memory: --batch-size 2 is too",
        ),
        (RuntimeError("no C compiler"), "failed: RuntimeError('no C compiler')"),
    ],
)
def test_what_cannot_be_measured_is_told_and_left_out(monkeypatch, capsys, error, said):
    real = bench.in_processes

    def failing(work, call):
        if call[2] == "naive" or call[1] == "kd":
            raise error
        return real(work, call)

    monkeypatch.setattr(bench, "in_processes", failing)
    monkeypatch.setattr(methods, "METHODS", {k: methods.METHODS[k] for k in ("none", "kd")})
    words = ["--only", "step", "methods", "--method", "none", "--variants", "naive", "float32"]
    command(*words)
    lines = capsys.readouterr().out.splitlines()
    told = [line.split()[0] for line in lines if said in line]
    assert told == ["naive", "kd"]
    assert any(line.startswith("float32") and "1.00x" in line for line in lines)


def test_what_was_measured_outlasts_an_interruption(monkeypatch, tmp_path):
    def interrupted(args, peaks):
        raise KeyboardInterrupt

    monkeypatch.setitem(bench.SECTIONS, "methods", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command("--only", "data", "methods", "--json", str(tmp_path / "b.json"))
    tree = json.loads((tmp_path / "b.json").read_text())
    assert tree["data"]["host_img_s"] > 0 and "methods" not in tree


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_only_where_it_is_no_emulation_unless_asked_for(monkeypatch, native, capsys):
    monkeypatch.setattr(parallel, "has_native", lambda *_: native)
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e9)
    seen = []
    monkeypatch.setattr(bench, "SECTIONS", dict(step=lambda args, _: seen.append(args), last=None))
    for words, low in (([], native), (["--variants", "bfloat16"], True)):
        command(*words)
        args = seen.pop()
        assert ("bfloat16" in args.variants) == ("bfloat16" in args.dtypes) == low
        assert {"naive", "float32"} <= {*args.variants} or words
        assert ("emulates" in capsys.readouterr().out) == (not low)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--student", "b9"], "unknown model 'b9'"),
        (["--teacher", "b9"], "unknown model 'b9'"),
        (["--method", "magic"], "unknown method 'magic'"),
        (["--size", "32x64"], "--size 32x64: 64x64 at least"),
        (["--batch-size", "0"], "--batch-size 0: must be positive"),
        (["--variants", "graphs"], "--variants: CUDA graphs need a GPU"),
        (["--batches", "1", "0"], "must be positive"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--workers", "-1"], "--workers -1: must not be negative"),
        (["--plot", "x.foo"], "x.foo: a file that ends in .png, .pdf or .svg"),
        (["--json", f"{__file__}/x.json"], "test_bench.py is a file, not a folder"),
        (["--json", "."], "a folder, not a file"),
        (["--only", "step", "--plot", "x.png"], "--plot draws what --only inference measures"),
    ],
)
def test_mistakes(words, complaint):
    with pytest.raises(UserError, match=complaint):
        command(*words)


def faults():
    """Page faults of filling a tensor of 40 MB: ten times as it is, ten times with kept memory."""
    counts = []
    for k in range(22):
        if k == 11:
            parallel.keep_memory()
        torch.zeros(10**7).add_(1)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return counts[10] - counts[0], counts[21] - counts[11]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_kept_memory_is_not_asked_for_again():
    ((asked, kept),) = timing.in_processes(faults, ())
    assert asked > 10 * 40e6 / 2**21 and asked > 5 * kept  # with pages of 2 MB or less
