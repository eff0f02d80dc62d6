"""
Train a teacher if there is none, distil it into a small student, score both.

    python train.py                                             # drawn scenes, minutes on two cores
    python train.py --dataset nyuv2 --data-dir D --student b0   # B2 teacher, B0 student, NYUv2
    torchrun --nproc_per_node=4 train.py --dataset nyuv2 --data-dir D

A run has up to three stages: `teacher` (unless --teacher-ckpt), `alone` (the student by itself with
the same budget, to compare with; --alone) and `student` (distilled). Everything random in step k of
a stage comes from the seed and k alone: that is why a run can be interrupted and resumed, or split
over processes, and stays the same run.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import augment
import catalog
import data
import eval as evaluation
import files
import flops
import model
import parallel
from files import UserError
from settings import (
    FINE_TUNING_LR,
    IMAGENET,
    PAPER_EPOCHS,
    build_method,
    check_method,
    command_line,
    get_args,
    resolve,
    settings,
)
from step import Learner, Teacher, learning_rate, parameter_groups, update

# ------------------------------------------------------------------------------------------------
# a run: what its stages share


@dataclasses.dataclass
class Run:
    args: argparse.Namespace
    out: Path
    device: torch.device
    dataset: catalog.Dataset
    train: object  # the splits: data.Packed or data.Files; the teacher's training images,
    few: object  # the student's, which may be fewer,
    val: object  # and those that score both
    augment: augment.Augment
    facts: dict  # what goes into every checkpoint beside the weights
    rank: int = 0
    world: int = 1
    results: dict = dataclasses.field(default_factory=dict)  # stage -> metrics, if finished
    inits: dict = dataclasses.field(default_factory=dict)  # stage -> what it started from
    state: dict | None = None  # last.pt, while a stage is to be resumed
    signals: list = dataclasses.field(default_factory=list)  # that came in

    def images(self, stage):
        """The split that a stage learns from."""
        return self.train if stage == "teacher" else self.few

    def print(self, *words):
        if self.rank == 0:
            print(*words, flush=True)

    def log(self, **record):
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")


def open_run(args):
    """Processes, data and facts of a run; resumes the one in --out-dir if asked to."""
    device = parallel.start(args.device)
    rank, world = parallel.rank_and_world()
    for batch in (args.batch_size, args.teacher_batch_size):
        if batch % (world * args.accumulate):
            raise UserError(
                f"batch size {batch} does not divide by {world} processes x {args.accumulate} "
                "parts (--batch-size counts the images of all processes together)"
            )
    out = Path(args.out_dir)
    names = ("last.pt", "teacher.pt", "student.pt", "log.jsonl")
    found = [f for f in names if (out / f).exists()]
    if found and not args.resume:
        raise UserError(f"{out} holds a run ({found[0]}): pass --resume, or another --out-dir")
    dataset = catalog.open_dataset(args.dataset, args.data_dir)
    cache = (args.data_dir, args.cache, args.cache_dir, args.cache_gb)
    train, val = parallel.first_then_others(
        lambda: [data.open_split(dataset, split, *cache) for split in ("train", "val")]
    )
    if args.workers is None:
        args.workers = 4 if device.type == "cuda" or isinstance(train, data.Files) else 0
    if args.max_iters is None:  # the paper's recipe
        n = args.student_images or len(train)
        args.max_iters = PAPER_EPOCHS * math.ceil(n / args.batch_size)
        shorter = PAPER_EPOCHS * math.ceil(len(train) / args.teacher_batch_size)
        args.teacher_iters = args.teacher_iters or shorter
    args.teacher_iters = min(args.teacher_iters or args.max_iters, args.max_iters)
    height, width = train.image(0).shape[:2]
    facts = dict(
        dataset=args.dataset,
        classes=list(dataset.classes),
        palette=[list(c) for c in dataset.palette],
        mean=list(model.IMAGENET_MEAN),
        std=list(model.IMAGENET_STD),
        short_side=min(height, width),  # of the images it was trained on
        resize=None,  # to this shorter side, for scoring
        void=None,  # the output that is none of the classes
        dtype=args.dtype,
    )
    crop = tuple(args.crop_size * 2)[:2] if len(args.crop_size) == 1 else tuple(args.crop_size)
    how = augment.Augment(crop, tuple(args.scale), colour=args.colour)
    if args.recipe == "paper":
        facts |= dict(mean=[0.0] * 3, std=[1.0] * 3, short_side=512, resize=512)
        scale = 512 / min(height, width)
        crop = (int(height * scale + 0.5), int(width * scale + 0.5))
        how = augment.Augment(crop, colour=args.colour, fit=True, label_stride=4)
    out.mkdir(parents=True, exist_ok=True)
    few = data.Subset(train, args.student_images) if args.student_images else train
    run = Run(args, out, device, dataset, train, few, val, how, facts, rank, world)
    if args.resume:
        resume(run)
    return run


def resume(run):
    """Read last.pt: the results of finished stages and the state of the interrupted one."""
    path, log = run.out / "last.pt", run.out / "log.jsonl"
    if not path.exists():
        if run.rank == 0:
            log.unlink(missing_ok=True)
        run.print(f"{path} is not there: nothing to resume, starting from the beginning")
        return
    state = files.load_tensors(path)
    if not isinstance(state, dict) or state.get("format") != "run-state-1":
        raise UserError(f"{path}: not the state of a run; was another file put in its place?")
    for name, now in settings(run.args).items():
        was = state["settings"].get(name)
        if was != now:
            raise UserError(f"--resume: --{name.replace('_', '-')} was {was}, now it is {now}")
    run.results, run.inits = state["results"], state["inits"]
    run.state = state if state["stage"] else None
    if run.rank == 0 and log.exists():  # drop what came after the saved step
        keep = []
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut off by a crash
                record = json.loads(line)
                if record["stage"] in run.results or record["step"] <= state["step"]:
                    keep.append(line + "\n")
        with files.atomic(log) as tmp:
            Path(tmp).write_text("".join(keep))


def save_state(run, stage=None, step=0, parts=None):
    """last.pt, all that --resume needs. parts: name -> object with a state_dict, within a stage."""
    if run.rank == 0:
        tree = dict(format="run-state-1", stage=stage, step=step, results=run.results)
        tree |= dict(settings=settings(run.args), inits=run.inits)
        tree |= {name: part.state_dict() for name, part in (parts or {}).items()}
        files.save_tensors(run.out / "last.pt", tree)


def catch_signals(run):
    """SIGTERM and the first Ctrl-C: finish the step, save, leave. A second one leaves at once."""

    def caught(number, frame):
        if number == signal.SIGINT and number in run.signals:
            raise KeyboardInterrupt
        run.signals.append(number)

    signal.signal(signal.SIGTERM, caught)
    signal.signal(signal.SIGINT, caught)


# ------------------------------------------------------------------------------------------------
# a stage


def run_stage(run, stage, name, method="none", teacher=None):
    """Train, score and save one net, or read it if that is done: (net in eval mode, facts)."""
    args, path = run.args, run.out / f"{stage}.pt"
    if stage in run.results:
        net, facts = model.load(path)
        return freeze(net, run.device), facts
    is_teacher = stage == "teacher"
    iters = args.teacher_iters if is_teacher else args.max_iters
    batch_size = args.teacher_batch_size if is_teacher else args.batch_size
    torch.manual_seed(args.seed)
    net = model.build(name, len(run.dataset.classes))
    run.print(f"\n{stage}: {name}, {model.count_parameters(net):,} parameters")
    init = start_from(run, stage, net)
    method = build_method(args, method, net, teacher and teacher[0])
    for note in [m.note for m in method.modules() if getattr(m, "note", "")]:
        run.print(note)
    extra = model.count_parameters(method)
    of = len(run.images(stage))
    adapters = f", {extra:,} more parameters to train" * (extra > 0)
    run.print(f"{iters} steps of {batch_size}, from {of} images{adapters}")
    start = time.time()
    lr = args.teacher_lr if is_teacher else args.lr
    lr = lr or (args.lr if init == "scratch" else min(args.lr, FINE_TUNING_LR))
    net = train_stage(run, stage, net, method, teacher, iters, batch_size, lr)
    seconds = round(time.time() - start, 1)
    record(run, stage, net, run.facts, iters, seconds)
    if run.rank == 0:
        model.save(path, net, **run.facts)
    save_state(run)
    return freeze(net, run.device), run.facts


def start_from(run, stage, net):
    """Load what a stage starts from, unless it is resumed anyway; returns its name.

    A teacher of --teacher-init auto starts from ImageNet weights where they can be had.
    """
    is_teacher = stage == "teacher"
    init = run.args.teacher_init if is_teacher else run.args.student_init
    if run.state and run.state["stage"] == stage:
        return run.inits[stage]
    auto = is_teacher and init == "auto" and run.dataset.name != "scenes"
    if init == "auto":
        init = IMAGENET.get(net.name) if auto else "scratch"
    if init != "scratch":
        quiet = contextlib.nullcontext() if run.rank == 0 else contextlib.redirect_stdout(None)
        try:
            if init is None:
                raise UserError(f"There are no ImageNet weights of a {net.name}.")
            with quiet:
                parallel.first_then_others(lambda: model.load_weights(net, init))
        except UserError as e:
            if not auto:
                raise
            run.print(
                f"!!! {e}\n!!! So the teacher starts from SCRATCH. TransKD's teachers start from "
                "ImageNet weights,\n!!! without which there is less to distil: pass --teacher-init "
                "or --teacher-ckpt."
            )
            init = "scratch"
    run.print(f"starts from {init}")
    run.inits[stage] = init
    return init


def find_teacher(run):
    """The teacher of --teacher-ckpt, scored like one that was trained here: (net, facts)."""
    net, facts = parallel.first_then_others(lambda: model.load(run.args.teacher_ckpt))
    catalog.check_classes(run.args.teacher_ckpt, net, facts, run.dataset)
    check_method(run.args, net)
    facts = catalog.complete(facts, net.num_classes, run.dataset)
    freeze(net, run.device)
    if "teacher" not in run.results:
        record(run, "teacher", net, facts, steps=0, seconds=0.0)
    return net, facts


def record(run, stage, net, facts, steps, seconds):
    """A finished net's scores and costs, as they go into metrics.json."""
    costs = flops.measure_named(net.name, net.num_classes, run.augment.crop)
    metrics = score(run, stage, net, facts, steps)
    run.results[stage] = dict(model=net.name, steps=steps, seconds=seconds) | costs | metrics


def freeze(net, device):
    net.to(device).to(memory_format=torch.channels_last)
    return net.eval().requires_grad_(False)


def train_stage(run, stage, net, method, teacher, iters, batch_size, lr):
    """Train `net` for `iters` steps; returns the net to keep (its running average with --ema)."""
    args, device = run.args, run.device
    split = run.images(stage)
    learner = Learner(net, method, class_weights(run, split)).to(device)
    learner = learner.to(memory_format=torch.channels_last)
    if run.world > 1:
        learner = parallel.synchronise(learner, device)
    paper = args.recipe == "paper"
    groups = parameter_groups(learner, args.weight_decay, everything=paper)
    parts = dict(
        learner=learner,
        optimizer=torch.optim.AdamW(groups, lr=lr, fused=True),
        scaler=torch.amp.GradScaler(device.type, enabled=args.dtype == "float16"),
    )
    if args.ema:
        average = get_ema_multi_avg_fn(args.ema)
        parts["ema"] = AveragedModel(net, multi_avg_fn=average, use_buffers=True)
    first = 0
    if run.state and run.state["stage"] == stage:
        first = run.state["step"]
        for name, part in parts.items():
            part.load_state_dict(run.state[name])
        run.print(f"going on from step {first}")
        run.state = None
    mean, std = run.facts["mean"], run.facts["std"]
    looks = Teacher(*teacher, mean, std, method.needs_logits) if method.needs_teacher else None
    if args.compile:  # the calls of a step, at its one size: scoring, at any size, stays as it is
        learner.compile()
        if looks:
            looks.compile()
    schedule = dict(peak=lr, total=iters, warmup=args.warmup)
    schedule |= dict(paper_epoch=math.ceil(len(split) / batch_size) if paper else None)
    loop(run, stage, parallel.wrap(learner, device), parts, looks, schedule, batch_size, first)
    return parts["ema"].module if args.ema else net


def loop(run, stage, wrapped, parts, teacher, schedule, batch_size, first):
    """The steps of a stage, from `first` to schedule["total"]."""
    args, total = run.args, schedule["total"]
    learner, optimizer, scaler = parts["learner"], parts["optimizer"], parts["scaler"]
    watch = Watch(run, stage, first, total, batch_size)
    batches = make_batches(run, run.images(stage), batch_size, first, total)
    learner.train()
    saved = time.time()
    for step in range(first, total):
        lr = learning_rate(step, **schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for part in range(args.accumulate):
            batch = next(batches)
            torch.manual_seed(hash((args.seed, step, part)))  # one for all processes, see Drop
            syncs = run.world == 1 or part == args.accumulate - 1
            with contextlib.nullcontext() if syncs else wrapped.no_sync():
                terms = loss_terms(run, wrapped, teacher, batch)
                scaler.scale(sum(terms.values()) / args.accumulate).backward()
            watch.add(step, terms)
        update(learner, optimizer, scaler, args.clip)
        if args.ema:
            parts["ema"].update_parameters(learner.student)
        stopping, due = parallel.any_process(run.signals, watch.due(step))
        if due:
            watch.report(step, lr)
        if args.eval_every and (step + 1) % args.eval_every == 0 and step + 1 < total:
            kept = parts["ema"].module if args.ema else learner.student
            score(run, stage, kept, run.facts, step + 1)
        if stopping or time.time() - saved > args.save_every:
            watch.check()
            save_state(run, stage, step + 1, parts)
            saved = time.time()
        if stopping:
            run.print(f"stopped after step {step + 1} of {stage}; the same with --resume goes on")
            raise SystemExit(128 + (run.signals or [signal.SIGTERM])[0])
    watch.check()


def make_batches(run, split, batch_size, first, last):
    """The split's micro-batches from step `first` to `last`, prepared by --workers processes."""
    args = run.args
    micro = batch_size // args.accumulate
    loader = torch.utils.data.DataLoader(
        augment.Batches(split, micro, args.seed, run.augment, run.rank, run.world),
        batch_size=None,
        sampler=range(first * args.accumulate, last * args.accumulate),
        num_workers=args.workers,
        pin_memory=run.device.type == "cuda",
    )
    return augment.stream(loader)


def loss_terms(run, wrapped, teacher, batch):
    """Forward passes of teacher and student: the dict of loss terms."""
    facts = run.facts
    images, labels = augment.device_batch(batch, run.device, facts["mean"], facts["std"])
    with evaluation.autocast(run.device, run.args.dtype):
        return wrapped(images, labels, teacher and teacher(images))


def class_weights(run, split):
    """Those of the paper for the training pixels, or None."""
    if run.args.class_weights == "none":
        return None
    return data.class_weights(split, len(run.dataset.classes))


def score(run, stage, net, facts, step):
    """Metrics on the val split, of which every process scores its share."""
    how = (run.device, run.args.dtype, run.args.protocol, run.args.eval_batch_size)
    how += (run.dataset.parts_of("val"),)
    metrics = evaluation.evaluate(net, run.val, facts, *how)
    run.print(f"{stage:7s} {step:6d} mIoU {evaluation.percent(metrics['miou'])}")
    run.log(stage=stage, step=step, miou=metrics["miou"], pixel_acc=metrics["pixel_acc"])
    return metrics


class Watch:
    """Sums the loss terms on the device, and says every few seconds how things go."""

    def __init__(self, run, stage, first, total, batch_size):
        self.run, self.stage, self.total, self.batch_size = run, stage, total, batch_size
        self.first, self.start = first, time.time()
        self.told, self.told_step = self.start, first
        self.names, self.sums, self.bad = [], 0, None

    def add(self, step, terms):
        self.names = list(terms)
        values = torch.stack([t.detach() for t in terms.values()])
        if self.bad is None:
            self.bad = torch.full_like(
                values, math.inf
            )  # first step at which a term was not finite
        self.bad = torch.where(values.isfinite(), self.bad, self.bad.clamp(max=step))
        self.sums = self.sums + values

    def check(self):
        """Stop if a term was not finite. Asked only now and then, for it waits for the device."""
        for name, step in zip(self.names, [] if self.bad is None else self.bad.tolist()):
            if step < math.inf:
                raise UserError(
                    f"{self.stage}: the loss term '{name}' was not finite at step {int(step)}. Try "
                    "a lower --lr or --dtype bfloat16 in a new --out-dir"
                )

    def due(self, step):
        """Time for a line? Whatever this process says, all of them report when one does."""
        if self.run.device.type == "cpu" or (step + 1) % 20 == 0:
            self.check()
        return time.time() - self.told >= self.run.args.log_every or step + 1 == self.total

    def report(self, step, lr):
        now, done = time.time(), step + 1
        steps = done - self.told_step
        means = parallel.process_mean(self.sums) / (steps * self.run.args.accumulate)
        terms = dict(zip(self.names, means.tolist()))
        speed = steps * self.batch_size / (now - self.told)
        eta = clock((self.total - done) * (now - self.start) / (done - self.first))
        words = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
        progress = f"{done:6d}/{self.total} {100 * done // self.total:3d}%"
        line = f"{self.stage:7s} {progress}  {words}  lr {lr:.1e}  {speed:.0f} img/s  eta {eta}"
        self.run.print(line)
        self.run.log(stage=self.stage, step=done, **terms, lr=lr, img_s=round(speed, 1))
        self.told, self.told_step, self.sums = now, done, 0


def clock(seconds):
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# ------------------------------------------------------------------------------------------------
# the end of a run


def report(run, nets):
    """metrics.json, the table of teacher, student alone and student, and a grid of pictures."""
    student = run.results["student"]
    cost = {k: student[k] for k in ("params", "gmacs", "attention_gmacs", "executed_gmacs")}
    tree = dict(miou=student["miou"], deployed=cost) | run.results
    with files.atomic(run.out / "metrics.json") as tmp:
        text = json.dumps(tree | dict(settings=settings(run.args)), indent=1)
        Path(tmp).write_text(text + "\n")
    head = f"{'params':>7s} {'GMACs':>7s} {'mIoU':>7s} {'pixel acc.':>11s} {'boundary IoU':>13s}"
    run.print(f"\n{'':34s} {head} {'time':>8s}")
    titles = dict(teacher="teacher", alone="student alone", student=f"student, {run.args.method}")
    for stage, r in run.results.items():
        title = f"{titles[stage]} ({r['model']})"
        shares = [evaluation.percent(r[k]) for k in ("miou", "pixel_acc", "boundary_iou")]
        run.print(
            f"{title:34s} {r['params'] / 1e6:6.2f}M {r['gmacs']:7.2f} {shares[0]:>7s} "
            f"{shares[1]:>11s} {shares[2]:>13s} {clock(r['seconds']):>8s}"
        )
    h, w = run.augment.crop
    few = f"student from {len(run.few)} of {len(run.train)} training images; "
    few *= run.few is not run.train
    scored = f"{student['images']} val images, protocol {student['protocol']}"
    run.print(f"{few}GMACs at {h}x{w}; {scored}")
    pictures(run, nets, ["photo", "labels", *(titles[s] for s in run.results)])
    run.print(f"wrote student.pt (to deploy), metrics.json and samples.png to {run.out}")


@torch.no_grad()
def pictures(run, nets, titles, rows=4, width=320):
    """samples.png: a row an image, with the photo, its labels, and what each net says."""
    grid = []
    for i in np.linspace(0, len(run.val) - 1, min(rows, len(run.val))).astype(int):
        image, label = run.val.pair(i)
        maps = []
        for net, facts in nets:
            x = evaluation.prepare(image, facts, facts["resize"]).to(run.device)
            maps.append(evaluation.predict(net, x, label.shape).argmax(dim=1)[0].cpu().numpy())
        row = [image, *(evaluation.paint(ids, run.dataset.palette) for ids in [label, *maps])]
        size = (width, width * image.shape[0] // image.shape[1])
        row = [np.asarray(Image.fromarray(p).resize(size, Image.NEAREST)) for p in row]
        grid.append(np.concatenate(row, axis=1))
    banner = Image.new("RGB", (width * len(titles), 24), "white")
    draw = ImageDraw.Draw(banner)
    for k, title in enumerate(titles):
        draw.text((k * width + width // 2, 12), title, fill="black", anchor="mm")
    picture = np.concatenate([np.asarray(banner), *grid])
    evaluation.save_image(Image.fromarray(picture), run.out / "samples.png")


# ------------------------------------------------------------------------------------------------
# the command


def main(args):
    if args.method == "list":
        return flops.print_methods(args.student or "b0", args.teacher or "b2", 20, (512, 1024))
    resolve(args)
    run = open_run(args)
    catch_signals(run)
    run.print(command_line(args))
    nets, teacher = [], None
    if args.method != "none":
        if args.teacher_ckpt:
            teacher = find_teacher(run)
        else:
            teacher = run_stage(run, "teacher", args.teacher)
        nets.append(teacher)
        if args.alone:
            nets.append(run_stage(run, "alone", args.student))
    nets.append(run_stage(run, "student", args.student, args.method, teacher))
    if run.rank == 0:
        report(run, nets)
    parallel.stop()


if __name__ == "__main__":
    cli_args = get_args()
    files.cli(main, cli_args)
