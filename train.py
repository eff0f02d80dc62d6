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
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import augment
import catalog
import data
import distill
import eval as evaluation
import files
import flops
import model
import parallel
from files import UserError

METHODS = flops.METHODS

# What a first run on each data set should use. Flags win over the recipe, the recipe over these.
COMMON = dict(
    student="b0",
    teacher="b2",
    alone=False,
    max_iters=20_000,
    batch_size=16,
    crop_size=[480],
    scale=[0.5, 2.0],
    colour=1.0,
    lr=6e-4,
    warmup=0.05,
    weight_decay=0.01,
    clip=1.0,
    class_weights="none",
)
# the teacher learns from 800 drawn scenes, the student from 20 of them: what a teacher is good for
SCENES = dict(student="nano", teacher="b0", student_images=20, alone=True, max_iters=900)
SCENES |= dict(crop_size=[96, 160], batch_size=8, lr=3e-3, scale=[0.75, 1.33])
STREET = dict(crop_size=[768], batch_size=8, max_iters=80_000)
DEFAULTS = {
    "scenes": COMMON | SCENES,
    "camvid": COMMON | dict(crop_size=[352, 480]),
    "nyuv2": COMMON,
    "folder": COMMON,
    "cityscapes": COMMON | STREET,
    "acdc": COMMON | STREET,
    "voc2012": COMMON,
    "ade20k": COMMON | dict(max_iters=80_000),
    "cocostuff164k": COMMON | dict(max_iters=80_000),
    "cocostuff10k": COMMON,
}
# TransKD as released. Beyond these flags: whole images, resized to a shorter side of 512, flipped
# and shifted by up to 2 pixels; RGB in [0, 1] without mean and std; labels, loss and score at a
# quarter of the size; weight decay on everything; lr * (1 - epoch / 1500) over 1000 epochs.
PAPER = dict(batch_size=2, teacher_batch_size=8, lr=6e-5, warmup=0.0, clip=0.0, colour=0.0)
PAPER |= dict(class_weights="paper", csf_norm="batch", protocol="paper")
# where on the hub there are ImageNet weights
IMAGENET = {f"b{n}": f"nvidia/mit-b{n}" for n in range(6)}
IMAGENET |= {f"pvt_v2_b{n}": f"OpenGVLab/pvt_v2_b{n}" for n in range(6)}
FINE_TUNING_LR = 6e-5  # a rate that leaves pre-trained weights what they know
PAPER_EPOCHS, PAPER_DECAY_EPOCHS = 1000, 1500
PAPER_DECIDES = ("crop_size", "scale")
# flags of the methods; those that no chosen method takes are an error
OPTIONS = """csf_norm feature_loss embed feature_weight embed_weight gl_init gl_residual kd_weight
temperature""".split()
# smallest and largest value of the flags that are numbers
LIMITS = dict.fromkeys(
    """max_iters teacher_iters batch_size teacher_batch_size accumulate student_images
    eval_batch_size""".split(),
    (1, 10**9),
)
LIMITS |= dict.fromkeys(
    """lr teacher_lr weight_decay clip colour feature_weight embed_weight kd_weight seed eval_every
    workers save_every log_every cache_gb""".split(),
    (0, 10**9),
)
LIMITS |= dict(warmup=(0, 1), ema=(0, 0.99999), temperature=(1e-3, 1e3))
# flags that may change when a run is resumed; all others may not
FREE = """out_dir data_dir cache cache_dir cache_gb resume workers device compile eval_every
eval_batch_size save_every log_every""".split()


# ------------------------------------------------------------------------------------------------
# the pieces of a step


class Learner(nn.Module):
    """The student and what teaches it: one module, so that DDP keeps the adapters in step too."""

    def __init__(self, student, method, class_weights=None):
        super().__init__()
        self.student, self.method = student, method
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, images, labels, seen):
        out = self.student(images)
        terms = {"ce": distill.cross_entropy(out.logits, labels, self.class_weights)}
        return terms | self.method(out, seen, images, labels)


def learning_rate(step, peak, total, warmup=0.0, paper_epoch=None):
    """lr of `step` (from 0): linear warm-up over a share of the run, then linear to 0 at `total`.

    paper_epoch: steps in an epoch; then it is the paper's, which changes once an epoch (from 1).
    """
    if paper_epoch:
        return peak * max(0.0, 1 - (step // paper_epoch + 1) / PAPER_DECAY_EPOCHS)
    rise = round(warmup * total)
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak * (total - step) / (total - rise)


def parameter_groups(module, weight_decay, everything):
    """Weight decay on matrices only (not norms, biases, scalars), or on everything (the paper)."""
    params = list(module.parameters())
    if everything:
        return [dict(params=params, weight_decay=weight_decay)]
    return [
        dict(params=[p for p in params if p.ndim > 1], weight_decay=weight_decay),
        dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0),
    ]


def look(teacher, images, run, needs_logits):
    """The teacher's output on the student's images: no graph, and no head unless it is needed."""
    net, facts = teacher
    if (facts["mean"], facts["std"]) != (run.facts["mean"], run.facts["std"]):
        mean, std = (torch.tensor(run.facts[k], device=images.device) for k in ("mean", "std"))
        images = images * std[:, None, None] + mean[:, None, None]  # back to [0, 1]
        images = augment.normalise(images, facts["mean"], facts["std"])
    with torch.no_grad():
        out = net(images, head=needs_logits)
    if needs_logits and facts["void"] is not None:  # an output that is none of the classes
        out = out._replace(logits=out.logits[:, : facts["void"]])
    return out


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


def settings(args):
    return {name: value for name, value in vars(args).items() if name not in FREE}


def command_line(args):
    """The command that says in full what was chosen by default."""
    words = ["python train.py"]
    for name, value in settings(args).items():
        if name in PAPER_DECIDES and args.recipe == "paper":
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            words += [flag, str(value)]
    return " ".join(words)


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
    options = {k: getattr(args, k) for k in OPTIONS if getattr(args, k) is not None}
    channels = teacher[0].channels if teacher else None
    options = options if method != "none" or args.method == "none" else {}
    widths = (net.width, teacher[0].width if teacher else None)
    known = (METHODS, widths, len(run.dataset.classes))
    method = distill.build_method(method, net.channels, channels, *known, **options)
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
    net, facts = model.load(run.args.teacher_ckpt)
    catalog.check_classes(run.args.teacher_ckpt, net, facts, run.dataset)
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
    if args.compile:
        learner.compile()
    schedule = dict(peak=lr, total=iters, warmup=args.warmup)
    schedule |= dict(paper_epoch=math.ceil(len(split) / batch_size) if paper else None)
    loop(run, stage, parallel.wrap(learner, device), parts, teacher, schedule, batch_size, first)
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
                terms = loss_terms(run, learner, wrapped, teacher, batch)
                scaler.scale(sum(terms.values()) / args.accumulate).backward()
            watch.add(step, terms)
        scaler.unscale_(optimizer)
        if args.clip:
            nn.utils.clip_grad_norm_(learner.parameters(), args.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
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


def loss_terms(run, learner, wrapped, teacher, batch):
    """Forward passes of teacher and student: the dict of loss terms."""
    facts, needs = run.facts, learner.method
    images, labels = augment.device_batch(batch, run.device, facts["mean"], facts["std"])
    with evaluation.autocast(run.device, run.args.dtype):
        seen = look(teacher, images, run, needs.needs_logits) if needs.needs_teacher else None
        return wrapped(images, labels, seen)


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


def add_method_flags(p):
    """The methods' own choices, for ablations. Not given, a method's own default holds."""
    p.add_argument("--csf-norm", choices=("none", "batch"), help="batch: CSF exactly as released")
    p.add_argument("--feature-loss", choices=(*distill.FEATURE_LOSSES,), help="none: PEA alone")
    p.add_argument("--embed", choices=(*distill.EMBED_STAGES,), help="PEA stages; none: CSF alone")
    p.add_argument("--feature-weight", type=float, help="factor of the feature terms (1)")
    p.add_argument("--embed-weight", type=float, help="factor of the embedding terms (1)")
    p.add_argument("--gl-init", type=float, help="start of GL-Mixer's two scalars (0.5)")
    p.add_argument(
        "--gl-residual", action="store_const", const=True, help="GL-Mixer adds its input"
    )
    p.add_argument("--kd-weight", type=float, help="factor of kd (1)")
    p.add_argument("--temperature", type=float, help="of kd's softmax (1)")


def add_run_flags(p):
    """Where a run lives, on what it runs, and what it tells."""
    yes_or_no = argparse.BooleanOptionalAction
    p.add_argument("--out-dir", help="(out/DATASET-STUDENT-METHOD)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out-dir")
    p.add_argument("--cache", choices=("on", "off"), default="on", help="decode the files once")
    p.add_argument("--cache-dir", help="where to (.cache beside the data)")
    p.add_argument("--cache-gb", type=float, help="no larger cache than this (half the free disk)")
    p.add_argument("--workers", type=int, help="processes that prepare batches; 0: the main one")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of autocast")
    p.add_argument("--compile", action=yes_or_no, default=False, help="torch.compile the training")
    p.add_argument("--protocol", choices=("full", "paper"), help="of scoring, see eval.py")
    p.add_argument("--eval-every", type=int, default=0, help="also score every N steps")
    p.add_argument("--eval-batch-size", type=int, default=8)
    p.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints")
    p.add_argument("--log-every", type=float, default=5, help="seconds between lines")


def get_args(argv=None):
    p = argparse.ArgumentParser(
        description="Train a teacher if there is none, and distil it into a student.",
        epilog="Defaults that depend on the data set: DEFAULTS in train.py.",
        allow_abbrev=False,
    )
    yes_or_no = argparse.BooleanOptionalAction
    # what
    p.add_argument("--dataset", default="scenes", help=f"one of {', '.join(catalog.DATASETS)}")
    p.add_argument("--data-dir", help="the folder that holds it (scenes are drawn, and need none)")
    p.add_argument("--student", help=f"one of {', '.join(model.MODELS)}")
    p.add_argument("--teacher", help="likewise; one that finds what the student would not")
    p.add_argument(
        "--teacher-ckpt",
        help="a trained one, so that none is trained: teacher.pt of a run, or anybody's SegFormer: "
        "a file, a folder, a name on the Hugging Face hub",
    )
    p.add_argument(
        "--teacher-init",
        default="auto",
        help="scratch, or weights: a file, a folder, a name on the hub; auto: nvidia/mit-TEACHER "
        "or the like (ImageNet), or scratch if it cannot be had, and for scenes",
    )
    p.add_argument("--student-init", default="scratch", help="likewise, without auto")
    p.add_argument("--method", default="transkd-base", help=f"{', '.join(METHODS)}; or a+b")
    p.add_argument("--alone", action=yes_or_no, help="also train the student by itself")
    p.add_argument("--student-images", type=int, help="only N of the training images (all)")
    p.add_argument("--recipe", choices=("default", "paper"), default="default", help="see PAPER")
    add_method_flags(p)
    # how long, how fast
    p.add_argument("--max-iters", type=int, help="steps of each stage, at most")
    p.add_argument("--teacher-iters", type=int, help="steps of the teacher, if fewer")
    p.add_argument("--batch-size", type=int, help="images a step, of all processes together")
    p.add_argument("--teacher-batch-size", type=int, help="likewise, for the teacher")
    p.add_argument("--accumulate", type=int, default=1, help="parts of a batch that is too big")
    p.add_argument("--lr", type=float, help="peak learning rate; 6e-5 suits pre-trained weights")
    p.add_argument(
        "--teacher-lr", type=float, help=f"(--lr; from weights {FINE_TUNING_LR} at most)"
    )
    p.add_argument("--warmup", type=float, help="share of the steps in which the rate rises")
    p.add_argument("--weight-decay", type=float, help="of AdamW")
    p.add_argument("--clip", type=float, help="largest gradient norm; 0: no clipping")
    p.add_argument("--ema", type=float, default=0.0, help="keep a running average, e.g. 0.999")
    p.add_argument("--class-weights", choices=("none", "paper"), help="paper: rare classes more")
    # augmentation
    p.add_argument("--crop-size", type=int, nargs="+", help="height and width, or one for both")
    p.add_argument("--scale", type=float, nargs=2, help="range of the random resize before it")
    p.add_argument("--colour", type=float, help="strength of the colour changes; 0: none")
    add_run_flags(p)
    return p.parse_args(argv)


def resolve(args):
    """Fill in what was not given, from recipe and data set, and check what can be checked."""
    if args.dataset not in catalog.DATASETS:
        names = ", ".join(catalog.DATASETS)
        raise UserError(f"unknown dataset '{args.dataset}': choose one of {names}")
    for name in PAPER_DECIDES if args.recipe == "paper" else ():
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} has no effect with --recipe paper")
    defaults = dict(dtype="float32")
    defaults |= DEFAULTS[args.dataset] | (PAPER if args.recipe == "paper" else {})
    defaults.setdefault("protocol", "full")
    if args.recipe == "paper":
        defaults.pop("max_iters")  # counted in epochs: open_run knows how long one is
    if model.get_device(args.device).type == "cuda":
        bf16 = torch.cuda.get_device_capability()[0] >= 8  # older ones only emulate it
        defaults |= dict(dtype="bfloat16" if bf16 else "float16")
    if "transkd" not in args.method or args.feature_loss == "none":
        defaults.pop("csf_norm", None)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out_dir = args.out_dir or f"out/{args.dataset}-{args.student}-{args.method}"
    for name in (args.student, args.teacher):
        if name not in model.MODELS:
            raise UserError(f"unknown model '{name}': choose one of {', '.join(model.MODELS)}")
    if not 1 <= len(args.crop_size) <= 2 or min(args.crop_size) < 32:
        raise UserError(f"--crop-size {args.crop_size}: one or two numbers, at least 32 each")
    if args.batch_size == args.accumulate and max(args.crop_size) < 64:
        raise UserError("one image at a time needs a --crop-size of 64, for its batch norms")
    if not 0 < args.scale[0] <= args.scale[1]:
        raise UserError(f"--scale {args.scale}: two positive numbers, the smaller first")
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {value}: must be {low} to {high}")
    args.teacher_batch_size = args.teacher_batch_size or args.batch_size


def main(args):
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
