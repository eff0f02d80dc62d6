"""
The time of training steps and of inference, and its causes, measured side by side in one run.

    python bench.py                                              # minutes on two cores
    python bench.py --only step --size 512x1024 --batch-size 16  # one question, on a GPU
    python bench.py --only methods                               # the cost of each method
    python bench.py --json bench.json --plot bench.png

Times are medians of repeated runs after a warm-up, the device synchronised. Compare only times of
one run: they differ from machine to machine, and from hour to hour. Images are noise and nets
untrained: neither changes what is computed.
"""

import argparse
import json
import os
import socket
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import augment
import data
import eval as evaluation
import export
import files
import flops
import loop
import methods
import model
import parallel
from files import UserError
from step import Graphed, Learner, Teacher, parameter_groups, update
from timing import Stopwatch, hardware, in_processes, matmul_peak, memory, timed

# How a step can be computed; each of the first five adds to the one before it, the others to the
# fifth. naive is what the released code does: autograd graph and head for the teacher, heads as
# drawn in the paper, explicit attention, an optimiser that is not fused. kept_memory is
# `parallel.keep_memory`, graphs is `step.Graphed`.
LOW = dict(lean=True, keep=True, channels_last=True, dtype="bfloat16")
VARIANTS = {
    "naive": {},
    "float32": dict(lean=True),
    "kept_memory": dict(lean=True, keep=True),
    "channels_last": dict(lean=True, keep=True, channels_last=True),
    "bfloat16": LOW,
    "graphs": LOW | dict(graphs=True),
    "compiled": LOW | dict(compile=True),
    "compiled_graphs": LOW | dict(compile=True, graphs=True),
}
FACTS = dict(mean=list(model.IMAGENET_MEAN), std=list(model.IMAGENET_STD))
FACTS |= dict.fromkeys(("void", "resize", "short_side"))

# ------------------------------------------------------------------------------------------------
# a training step


def noise(size, num_classes, images=16):
    """A split of noise images, twice as high and wide as the crops, as for Cityscapes."""
    rng = np.random.default_rng(0)
    h, w = (2 * n for n in size)
    pixels = rng.integers(256, size=images * 3 * h * w, dtype=np.uint8)
    labels = rng.integers(num_classes, size=images * h * w, dtype=np.uint8)
    return data.Packed(pixels, labels, [(h, w, i * h * w) for i in range(images)])


def loader(args, batch_size, workers):
    """Endless host batches."""
    split = noise(args.size, args.num_classes)
    batches = augment.Batches(split, batch_size, 0, augment.Augment(args.size))
    return loop.load(batches, range(10**6), workers, torch.device(args.device))


def build_step(args, spec, lean=False, channels_last=False, dtype="float32", compile=False):
    """(learner, the teacher's forward pass) of a training step, on the device."""
    torch.manual_seed(0)
    teacher = model.build(args.teacher, args.num_classes).eval()
    student = model.build(args.student, args.num_classes)
    method = methods.build(spec, student, teacher)
    learner = Learner(student, method).train()
    if lean:
        mean, std = FACTS["mean"], FACTS["std"]
        run_teacher = Teacher(teacher, FACTS, mean, std, method.needs_head, dtype)
    else:
        run_teacher = teacher  # called directly: with autograd graph and head
        for net in (teacher, student):
            net.forward = mock.patch.object(model, "attend", model.written_out)(net.forward)
        for module in (*teacher.modules(), *student.modules()):
            if isinstance(module, model.SegFormerHead):
                module.merged = False
    for module in (learner, run_teacher):
        module.to(args.device)
        if channels_last:
            module.to(memory_format=torch.channels_last)
    if compile:
        learner.compile(dynamic=False)
        run_teacher.compile(dynamic=False)
    return learner, method.needs_teacher and run_teacher


def whole_and_parts(step, watch, seconds):
    """A step's median seconds, and those of its parts, spending `seconds` on each on a GPU.

    There the marks of the parts make the host wait, which a training does not: the whole is timed
    without them, eight steps at a time.
    """
    device = watch.device
    whole = timed(step, device, seconds, warmup=0)
    parts = watch.medians()
    if torch.device(device).type == "cuda":
        watch.device = "cpu"  # which nothing waits for
        whole = timed(lambda: [step() for _ in range(8)], device, seconds, warmup=0) / 8
    return whole, parts


def time_step(args, spec, variant, batch_size):
    """A step's cost: seconds, in total and by part, and memory in GB."""
    options = dict(VARIANTS[variant])
    if options.pop("keep", False):
        parallel.keep_memory()
    dtype, graphs = options.get("dtype", "float32"), options.pop("graphs", False)
    before = memory(args.device, "now")
    learner, run_teacher = build_step(args, spec, **options)
    if parallel.rank_and_world()[1] > 1:
        learner = parallel.share_statistics(learner, args.device)
    wrapped = parallel.wrap(learner, args.device)
    groups = parameter_groups(learner, 0.01)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused="lean" in options)
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=False)
    batches = loader(args, batch_size, args.workers)
    watch = Stopwatch(args.device)
    mark = (lambda name: None) if graphs else watch.mark
    if "compile" not in options:  # the hook would be compiled with the rest
        learner.student.register_forward_hook(lambda *_: mark("student"))

    def forward_backward(images, labels):
        with evaluation.autocast(args.device, dtype):
            seen = run_teacher(images) if run_teacher else None
            mark("teacher")
            terms = wrapped(images, labels, seen)
        mark("losses")
        sum(terms.values()).backward()
        return {name: term.detach() for name, term in terms.items()}

    if graphs:
        forward_backward = Graphed(forward_backward, args.device)

    def step():
        watch.mark("start")
        batch = next(batches)
        images, labels = augment.device_batch(batch, args.device, FACTS["mean"], FACTS["std"])
        if "channels_last" not in options:
            images = images.contiguous()
        watch.mark("data")
        forward_backward(images, labels)
        watch.mark("replay" if graphs else "backward")
        update(learner, optimizer, scaler, clip=1.0, keep=graphs)
        watch.mark("optimiser")

    start = time.time()
    step()
    first = time.time() - start
    for _ in range(Graphed.WARM_UP if graphs else 1):
        step()
    watch.times.clear()
    seconds, parts = whole_and_parts(step, watch, args.seconds)
    peak = memory(args.device, "peak")
    return dict(
        variant=variant,
        seconds=seconds,
        first=first,
        parts=parts,
        memory_gb=None if peak is None else peak - before,
        img_s=batch_size / seconds,
    )


def time_alone(args, spec, name, variant):
    """`time_step` in a process of its own; None, and a line that begins `name`, if it fails."""
    try:
        return in_processes(time_step, (args, spec, variant, args.batch_size))[0]
    except torch.OutOfMemoryError:
        print(f"{name:14s}out of memory: --batch-size {args.batch_size} is too large", flush=True)
    except Exception as e:  # e.g. no compiler: the others can be measured all the same
        print(f"{name:14s}failed: {e!r:.300}", flush=True)
    return None


def step_flops(args):
    """FLOPs per image of (the teacher's forward pass, the whole step): 2 per multiply-accumulate.

    Those of the lean step, each once; backward is twice the forward of student and adapters.
    """
    with torch.device("meta"):
        teacher, student = (
            model.build(name, args.num_classes).eval() for name in (args.teacher, args.student)
        )
        method = methods.build(args.method, student, teacher).eval()
        image = torch.empty(1, 3, *args.size)
        labels = torch.zeros(1, *args.size, dtype=torch.uint8)
        seen = teacher(image)

        def learn():
            method(student(image), seen, image, labels)

        teacher_gmacs = sum(flops.count(lambda: teacher(image, head=method.needs_head)))
        teacher_gmacs *= method.needs_teacher
        return 2e9 * teacher_gmacs, 2e9 * (teacher_gmacs + 3 * sum(flops.count(learn)))


def bench_step(args, peaks):
    h, w = args.size
    print(f"\na training step: {args.method}, {args.teacher} to {args.student}, ", end="")
    print(f"{args.batch_size} images of {h}x{w}; of peak: useful FLOP/s, teacher and step")
    names = ("data", "teacher", "student", "losses", "backward", "optimiser")
    titles = "".join(f"{name:>10s}" for name in names)
    print(f"{'':14s}{'ms':>7s}{'faster':>8s}{titles}{'GB':>7s}{'img/s':>8s}{'of peak':>12s}")
    teacher_flops, whole = step_flops(args)
    rows = []
    for variant in args.variants:
        r = time_alone(args, args.method, variant, variant)
        if r is None:
            continue
        peak = peaks[VARIANTS[variant].get("dtype", "float32")]
        r["utilisation"] = whole * r["img_s"] / peak
        parts = [r["parts"].get(name) for name in names]
        shares = ["-", f"{r['utilisation']:.0%}"]
        if parts[1]:
            r["teacher_utilisation"] = teacher_flops * args.batch_size / parts[1] / peak
            shares[0] = f"{r['teacher_utilisation']:.0%}"
        rows.append(r)
        parts = "".join(f"{'-' if t is None else round(1000 * t):>10}" for t in parts)
        print(
            f"{variant:14s}{1000 * r['seconds']:7.0f}{rows[0]['seconds'] / r['seconds']:7.2f}x"
            f"{parts}{gigabytes(r)}{r['img_s']:8.1f}{shares[0]:>7s}{shares[1]:>5s}",
            flush=True,
        )
        if "compile" in VARIANTS[variant]:
            print(f"{'':14s}(its first step, which compiles, took {r['first']:.0f} s)")
    return rows


def gigabytes(row):
    return f"{'-' if row['memory_gb'] is None else format(row['memory_gb'], '.2f'):>7s}"


# ------------------------------------------------------------------------------------------------
# inference


def hugging_face(net, device):
    """The same weights in transformers' SegFormer; None if it, or transformers, does not exist."""
    if not export.fits_hugging_face(net):
        return None
    if not all(map(files.installed, ("transformers", "safetensors"))):
        print("\nto compare with Hugging Face's SegFormer: pip install transformers safetensors")
        return None
    from transformers import SegformerForSemanticSegmentation
    from transformers.utils import logging

    logging.disable_progress_bar()
    classes = [f"class {k}" for k in range(net.num_classes)]
    with tempfile.TemporaryDirectory() as folder:
        facts = FACTS | dict(classes=classes)
        export.write_hf(net, facts, Path(folder), (FACTS["mean"], FACTS["std"]))
        return SegformerForSemanticSegmentation.from_pretrained(folder).eval().to(device)


def time_inference(args, net, size, batch, dtype="float32"):
    """Seconds of one forward pass of a batch."""
    images = torch.randn(batch, 3, *size, device=args.device)

    def forward():
        with torch.inference_mode(), evaluation.autocast(args.device, dtype):
            net(images)

    return timed(forward, args.device, args.seconds / 4)


def bench_inference(args, peaks):
    """Rows of (what, kind, size, batch, seconds): by image size, by batch, by model."""
    rows, (h, w) = [], args.size
    names = dict.fromkeys((*args.models, args.student))
    ours = {name: model.build(name, args.num_classes).eval() for name in names}
    student = ours[args.student]
    theirs = hugging_face(student, args.device)
    for net in ours.values():
        net.to(args.device).to(memory_format=torch.channels_last)
    sizes = [tuple(round(n * s / 32) * 32 for n in args.size) for s in (0.5, 1, 2)]
    kinds = {dtype: (student, dtype) for dtype in args.dtypes}
    if theirs:
        kinds["transformers, float32"] = (theirs, "float32")

    def measure(what, kind, net, size, batch, dtype):
        seconds = time_inference(args, net, size, batch, dtype)
        rows.append(dict(what=what, kind=kind, size=size, batch=batch, seconds=seconds))
        return seconds

    def table(what, heads, cells):
        print(f"\n{args.student}, milliseconds per image, by {what}")
        print(f"{'':24s}" + "".join(f"{head!s:>12}" for head in heads))
        for kind, (net, dtype) in kinds.items():
            print(f"{kind:24s}", end="")
            for size, batch in cells:
                ms = 1000 * measure(what, kind, net, size, batch, dtype) / batch
                print(f"{ms:12.1f}", end="", flush=True)
            print()

    table("image, one at a time", [f"{a}x{b}" for a, b in sizes], [(size, 1) for size in sizes])
    table(f"batch, of {h}x{w}", args.batches, [(args.size, batch) for batch in args.batches])
    print(f"\none image of {h}x{w}, milliseconds, by model")
    print("".join(f"{name:>12s}" for name in ours))
    for name, net in ours.items():
        ms = 1000 * measure("model", name, net, args.size, 1, "float32")
        print(f"{ms:12.1f}", end="", flush=True)
    print()
    return rows


# ------------------------------------------------------------------------------------------------
# other measurements: data, processes, methods


def bench_data(args, peaks):
    """Images per second of one host process, and of the device's part."""
    batches = loader(args, args.batch_size, 0)
    host = args.batch_size / timed(lambda: next(batches), "cpu", args.seconds / 2)
    batch = next(batches)
    mean, std = FACTS["mean"], FACTS["std"]
    seconds = timed(
        lambda: augment.device_batch(batch, args.device, mean, std), args.device, args.seconds / 4
    )
    device = args.batch_size / seconds
    h, w = args.size
    print(f"\ndata, crops of {h}x{w} from images of {2 * h}x{2 * w}, images per second: ", end="")
    print(f"one process cuts {host:.0f}, the device resamples {device:.0f}")
    rates = dict(host_img_s=host, device_img_s=device)
    if args.workers:
        batches = loader(args, args.batch_size, args.workers)
        n = 16 * args.workers  # which deliver several at once
        seconds = timed(lambda: [next(batches) for _ in range(n)], "cpu", 2 * args.seconds)
        rates["workers_img_s"] = n * args.batch_size / seconds
        print(f"{args.workers} worker processes deliver {rates['workers_img_s']:.0f} per second")
    return rates


def time_rank(args, rank, world, port, batch_size):
    """A step's seconds in one of `world` processes, of one run if given a port, else separate."""
    torch.set_num_threads(max(1, os.cpu_count() // world))
    device = torch.device(args.device)
    if port:
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank))
        os.environ |= dict(WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        device = parallel.start(args.device)
    elif device.type == "cuda":
        device = torch.device("cuda", rank)
    args = argparse.Namespace(**vars(args) | dict(device=device))
    variant = "bfloat16" if device.type == "cuda" else "channels_last"
    seconds = time_step(args, args.method, variant, batch_size)["seconds"]
    parallel.stop()
    return seconds


def bench_processes(args, peaks, world=2):
    """Seconds of a step: processes that share a batch, against separate ones."""
    cuda = torch.device(args.device).type == "cuda"
    if cuda and torch.cuda.device_count() < world:
        print(f"\nprocesses: {world} of them need {world} GPUs")
        return None
    share, seconds = max(1, args.batch_size // world), {}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free = s.getsockname()[1]
    for what, port in (("apart", None), ("together", free)):
        jobs = [(args, rank, world, port, share) for rank in range(world)]
        seconds[what] = max(in_processes(time_rank, *jobs))
    extra = seconds["together"] / seconds["apart"] - 1
    print(
        f"\n{world} processes, {share} images each: {1000 * seconds['apart']:.0f} ms a step, each "
        f"for itself; {1000 * seconds['together']:.0f} ms as one run: {extra:+.1%}"
    )
    return seconds


def bench_methods(args, peaks):
    """The time of every method's step, as a multiple of training without distillation."""
    variant = "bfloat16" if torch.device(args.device).type == "cuda" else "channels_last"
    print(f"\na step of each method, {args.teacher} to {args.student}, {variant}")
    print(f"{'':14s}{'ms':>7s}{'of none':>9s}{'GB':>7s}")
    rows = {}
    for name in methods.METHODS:
        r = time_alone(args, name, name, variant)
        if r is None:
            continue
        rows[name] = r
        ratio = r["seconds"] / rows.get("none", r)["seconds"]
        print(f"{name:14s}{1000 * r['seconds']:7.0f}{ratio:8.2f}x{gigabytes(r)}", flush=True)
    return rows


SECTIONS = dict(
    step=bench_step,
    inference=bench_inference,
    data=bench_data,
    processes=bench_processes,
    methods=bench_methods,
)

# ------------------------------------------------------------------------------------------------
# the command


def plot(rows, path):
    """Milliseconds by pixels, by batch and by model, as bars and lines."""
    from matplotlib.figure import Figure

    whats = dict.fromkeys(r["what"] for r in rows)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axis, what in zip(figure.subplots(1, len(whats)), whats):
        mine = [r for r in rows if r["what"] == what]
        axis.set(title=what, ylabel="ms per image")
        if what == "model":
            axis.bar([r["kind"] for r in mine], [1000 * r["seconds"] for r in mine])
            continue
        batch = "batch" in what
        for kind in dict.fromkeys(r["kind"] for r in mine):
            line = [r for r in mine if r["kind"] == kind]
            x = [r["batch"] if batch else r["size"][0] * r["size"][1] for r in line]
            ms = [1000 * r["seconds"] / r["batch"] for r in line]
            axis.plot(x, ms, marker="o", label=kind)
        ticks = [r["batch"] if batch else "{}x{}".format(*r["size"]) for r in line]
        axis.set(xscale="log", yscale="linear" if batch else "log")
        axis.set_xticks(x, ticks)
        axis.set_xticks([], minor=True)
        if batch:
            axis.set_ylim(bottom=0)
        axis.legend()
    with files.atomic(path) as tmp:
        figure.savefig(tmp, format=Path(path).suffix[1:] or "png", dpi=100)


def get_args(argv=None):
    p = argparse.ArgumentParser(
        description="Time training steps, images, data and processes", allow_abbrev=False
    )
    cuda = torch.cuda.is_available()
    p.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=[*SECTIONS][:-1],
        help="what to measure (default: all but methods, which takes minutes)",
    )
    p.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        help="of the training step (default: all, but without a GPU no graphs, and not compiled, "
        "which takes minutes, and not bfloat16 where the device emulates it)",
    )
    p.add_argument("--student", default="b0", help=f"one of {', '.join(model.MODELS)}")
    p.add_argument("--teacher", default="b2", help=f"one of {', '.join(model.NAMES)}")
    p.add_argument("--method", default="transkd-base", help="a or a+b, as in train.py")
    p.add_argument(
        "--models", nargs="*", default=["nano", "b0", "b1", "b2"], help="whose inference is timed"
    )
    p.add_argument("--num-classes", type=int, default=19, help="of all nets (default: 19)")
    size = "512x1024" if cuda else "352x480"
    p.add_argument("--size", type=flops.size, default=size, help="HEIGHTxWIDTH of a crop")
    p.add_argument("--batch-size", type=int, default=16 if cuda else 4, help="of a training step")
    batches = [1, 2, 4, 8, 16, 32, 64] if cuda else [1, 2, 4, 8]
    p.add_argument("--batches", type=int, nargs="+", default=batches, help="of inference")
    p.add_argument(
        "--workers", type=int, default=parallel.spare_cores() if cuda else 0, help="for data"
    )
    p.add_argument(
        "--seconds", type=float, default=8, help="spent on measuring a step; others take a share"
    )
    p.add_argument("--device", default="cuda" if cuda else "cpu", help="cuda, cuda:N, cpu")
    p.add_argument("--json", help="write every number to this file")
    p.add_argument("--plot", help="draw the inference times into this file")
    return p.parse_args(argv)


def check(args):
    """UserError for what cannot be measured, before minutes are spent on the rest."""
    device = parallel.get_device(args.device)
    native = parallel.has_native(device, "bfloat16")
    if args.variants is None:
        slow = ["compile", "graphs"] * (device.type == "cpu") + ["dtype"] * (not native)
        args.variants = [name for name, options in VARIANTS.items() if not options.keys() & slow]
    if device.type == "cpu" and any("graphs" in VARIANTS[name] for name in args.variants):
        raise UserError("--variants: CUDA graphs need a GPU")
    args.dtypes = ["float32"]
    if native or any("dtype" in VARIANTS[name] for name in args.variants):
        args.dtypes.append("bfloat16")
    for name in (args.student, *args.models):
        if name not in model.MODELS:
            raise UserError(f"unknown model '{name}': choose among {', '.join(model.MODELS)}")
    if min(args.size) < 64:
        raise UserError(f"--size {args.size[0]}x{args.size[1]}: 64x64 at least")
    for name in ("batch_size", "num_classes", "seconds", "batches"):
        value = getattr(args, name)
        if not 0 < np.min(value) <= np.max(value) < 10**9:
            raise UserError(f"{files.as_flag(name)} {value}: must be positive, and below 10^9")
    if not 0 <= args.workers <= 256:
        raise UserError(f"--workers {args.workers}: must not be negative, nor above 256")
    if args.plot and Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {args.plot}: a file that ends in .png, .pdf or .svg")
    for path in filter(None, (args.json, args.plot)):
        files.check_folder("the folder", Path(path).parent)
        if Path(path).is_dir():
            raise UserError(f"{path}: a folder, not a file")
    if args.plot and "inference" not in args.only:
        raise UserError("--plot draws what --only inference measures")
    if args.plot and not files.installed("matplotlib"):
        raise UserError("--plot: pip install matplotlib")
    with torch.device("meta"):
        teacher = model.build(args.teacher, args.num_classes)
        methods.build(args.method, model.build(args.student, args.num_classes), teacher)


def main(args):
    check(args)
    parallel.keep_memory()
    tree = dict(hardware=hardware(args.device), torch=torch.__version__, settings=vars(args))
    print(f"{tree['hardware']}, torch {tree['torch']}")
    if "bfloat16" not in args.dtypes:
        print("bfloat16 is left out: this device emulates it, many times slower than float32")
    peaks = {dtype: matmul_peak(args.device, dtype) for dtype in args.dtypes}
    tree["peak_flops"] = peaks
    shown = ", ".join(f"{dtype} {peak / 1e12:.2f}" for dtype, peak in peaks.items())
    print(f"TFLOP/s of a large matrix product: {shown}")
    for section in args.only:
        if torch.device(args.device).type == "cuda":
            torch.cuda.empty_cache()  # other processes use this GPU
        tree[section] = SECTIONS[section](args, peaks)
        if args.json:  # now, for the next section may be interrupted
            files.write_text(args.json, json.dumps(tree, indent=1) + "\n")
    if args.plot:
        plot(tree["inference"], args.plot)


if __name__ == "__main__":
    files.cli(main, get_args())
