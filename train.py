"""
Train a teacher if there is none, distil it into a small student, score both.

    python train.py                                             # drawn scenes, minutes on two cores
    python train.py --dataset nyuv2 --data-dir D --student b0   # B2 teacher, B0 student, NYUv2
    torchrun --nproc_per_node=4 train.py --dataset nyuv2 --data-dir D

A run has up to three stages, trainings one after the other: `teacher` (unless --teacher-ckpt),
`alone` (the student by itself with the same budget, to compare with; --alone) and `student`
(distilled). All randomness in step k of a stage comes from the seed and k alone: that is why a run
can be interrupted and resumed, or split over processes, and stays the same run.
"""

import contextlib
import dataclasses
import functools
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import augment
import catalog
import data
import distill
import eval as evaluation
import files
import flops
import loop
import model
import parallel
from files import UserError
from settings import (
    FINE_TUNING_LR,
    IMAGENET,
    PAPER_EPOCHS,
    check_method,
    command_line,
    get_args,
    method_of,
    resolve,
)
from step import Learner, Teacher, mean_count

# ------------------------------------------------------------------------------------------------
# a run: what its stages share


@dataclasses.dataclass(kw_only=True)
class Run(loop.Run):
    dataset: catalog.Dataset
    # four splits, as data.open_split returns them:
    train: object  # what the teacher learns from
    few: object  # what the student learns from: the same, or --student-images of them
    unlabelled: object  # the split of --unlabelled, or ()
    val: object  # what scores both
    augment: augment.Augment
    facts: dict  # what every checkpoint holds besides the weights

    def images(self, stage):
        """The split that a stage learns from: without a teacher, only images with labels."""
        if stage == "teacher":
            return self.train
        labels = self.args.student_labels or len(self.few)
        if stage == "alone" or self.args.method == "none":
            return data.subset(self.few, labels)
        return data.few_labels(self.few, labels, self.unlabelled)


def open_run(args):
    """Processes, data and facts of a run; resumes the one in --out-dir if asked to."""
    batch_sizes = filter(None, (args.batch_size, args.teacher_batch_size))
    common = loop.start(args, batch_sizes, ("teacher.pt", "student.pt"))
    dataset = catalog.open_dataset(args.dataset, args.data_dir)
    cache = (args.data_dir, args.cache, args.cache_dir, args.cache_gb)
    sides = dict.fromkeys(filter(None, ["train", "val", args.unlabelled]), args.short_side)
    sides["val"] = None  # its labels stay as they are
    splits = parallel.first_then_others(
        lambda: {name: data.open_split(dataset, name, *cache, side) for name, side in sides.items()}
    )
    train, val = splits["train"], splits["val"]
    if args.workers is None:
        busy = common["device"].type == "cuda" or isinstance(train, data.Files)
        args.workers = parallel.spare_cores() if busy else 0
    if args.max_iters is None:  # the paper's recipe
        n = args.student_images or len(train)
        args.max_iters = PAPER_EPOCHS * math.ceil(n / args.batch_size)
        if args.teacher and args.teacher_iters is None:
            args.teacher_iters = PAPER_EPOCHS * math.ceil(len(train) / args.teacher_batch_size)
    if args.teacher and args.teacher_iters is None:
        args.teacher_iters = args.max_iters
    whiten, paper = args.normalise == "imagenet", args.recipe == "paper"
    facts = dict(
        dataset=args.dataset,
        classes=list(dataset.classes),
        palette=[list(c) for c in dataset.palette],
        mean=list(model.IMAGENET_MEAN) if whiten else [0.0] * 3,
        std=list(model.IMAGENET_STD) if whiten else [1.0] * 3,
        short_side=data.short_side(train),  # of the images it was trained on
        resize=args.short_side or None,  # to this shorter side, for scoring
        void=None,  # the output that is no class
        dtype=args.dtype,
    )
    crop = tuple(args.crop_size * 2)[:2]  # one number: height and width
    if paper:
        facts |= dict(short_side=512, resize=512)
        crop = catalog.resize_image(train.image(0), facts["resize"]).shape[:2]  # as in scoring
    loop.claim(common["out"], common["rank"])
    few = data.subset(train, args.student_images) if args.student_images else train
    mine = dict(dataset=dataset, train=train, few=few, val=val, facts=facts)
    mine["unlabelled"] = splits.get(args.unlabelled, ())
    mine["augment"] = augment.Augment(
        crop, tuple(args.scale), colour=args.colour, fit=paper, label_stride=args.label_stride
    )
    run = Run(args=args, **common, **mine)
    run.data = dict(classes=facts["classes"], train=len(train), val=len(val))
    run.data["unlabelled"] = len(run.unlabelled)
    run.data["checksum of names and sizes"] = data.fingerprint(dataset, sides)
    if args.resume:
        loop.resume(run)
    check_stage_labels(run)
    return run


def check_stage_labels(run):
    """UserError if labels that a stage learns from, or is scored on, are void all over."""
    with only_first_prints(run):
        if run.args.teacher:
            data.check_labels(run.train, run.dataset.classes, "training images")
        data.check_labels(run.images("alone"), run.dataset.classes, "student's images")
        data.check_labels(run.val, run.dataset.classes, "validation images")


# ------------------------------------------------------------------------------------------------
# a stage


def run_stage(run, stage, name, spec="none", teacher=None):
    """Train, score and save one net, or load it if that is done: (net in eval mode, facts).

    spec: the method's name; teacher: what this function or find_teacher returned for it.
    """
    args, path = run.args, run.out / f"{stage}.pt"
    if stage in run.results:
        net, facts = model.load(path)
        loop.check_same_net(run, stage, net, path)
        return loop.freeze(net, run.device), facts
    iters, batch_size, lr, init = args.max_iters, args.batch_size, args.lr, args.student_init
    if stage == "teacher":
        iters, batch_size = args.teacher_iters, args.teacher_batch_size
        lr, init = args.teacher_lr, args.teacher_init
    torch.manual_seed(args.seed)
    net = model.build(name, len(run.dataset.classes))
    run.print(f"\n{stage}: {name}, {model.count_parameters(net):,} parameters")
    init = start_from(run, stage, net, init)
    if lr is None:  # --teacher-lr was not given
        lr = args.lr if init == "scratch" else min(args.lr, FINE_TUNING_LR)
    method = method_of(args, spec, net, teacher and teacher[0])
    for note in [m.note for m in method.modules() if isinstance(m, distill.Method) and m.note]:
        run.print(note)
    extra = model.count_parameters(method)
    n_images = len(run.images(stage))
    adapters = f", {extra:,} parameters of adapters" if extra else ""
    run.print(f"{iters} steps of {batch_size}, from {n_images} images{adapters}")
    net, seconds = train_stage(run, stage, net, method, teacher, iters, batch_size, lr)
    record(run, stage, net, run.facts, iters, seconds)
    if run.rank == 0:
        model.save(path, net, **run.facts)
    loop.save_state(run)
    return loop.freeze(net, run.device), run.facts


def train_stage(run, stage, net, method, teacher, iters, batch_size, lr):
    """Train `net`: (the net to keep, with --ema its running average; the seconds it took)."""
    args = run.args
    split = run.images(stage)
    paper = args.recipe == "paper"
    weights = None if method.replaces_ce else class_weights(run, split)
    ce = functools.partial(distill.cross_entropy, class_weights=weights)
    learner = Learner(net, method, ce)
    mean, std = run.facts["mean"], run.facts["std"]
    frozen = None
    if method.needs_teacher:
        frozen = Teacher(*teacher, mean, std, method.needs_head, args.dtype).to(run.device)
    parts = loop.trained_parts(run, learner, frozen, lr, decay_everything=paper)
    if args.ema:
        average = get_ema_multi_avg_fn(args.ema)
        parts["ema"] = AveragedModel(net, multi_avg_fn=average, use_buffers=True)
    schedule = dict(peak=lr, total=iters, warmup=args.warmup)
    if paper:  # of all images, labelled or not: the schedules of all students end alike
        images = run.train if stage == "teacher" else run.few
        schedule["paper_epoch"] = math.ceil(len(images) / batch_size)
    batches = make_batches(run, split, batch_size)
    prepare = functools.partial(augment.device_batch, device=run.device, mean=mean, std=std)
    scoring = functools.partial(score, run, stage, facts=run.facts)

    def count(batches):
        return mean_count([batch["label"] for batch in batches], weights, run.device)

    parted = args.accumulate > 1
    seconds = loop.run_steps(
        run, stage, parts, batches, prepare, frozen, schedule, scoring, count if parted else None
    )
    return (parts["ema"].module if args.ema else net), seconds


def make_batches(run, split, batch_size):
    """Host batches of a split, by number: `accumulate` of them make a batch of batch_size."""
    part_size = batch_size // run.args.accumulate
    return augment.Batches(split, part_size, run.args.seed, run.augment, run.rank, run.world)


def class_weights(run, split):
    """The paper's weights (K,) for the split's labels, on the device; None if not used."""
    if run.args.class_weights == "none":
        return None
    with only_first_prints(run):
        return data.class_weights(split, len(run.dataset.classes)).to(run.device)


def record(run, stage, net, facts, steps, seconds):
    """Put a finished net's scores and costs into the run's results, for metrics.json."""
    costs = flops.measure_named(net.name, net.num_classes, run.augment.crop, net.width)
    metrics = score(run, stage, net, steps, facts)
    run.results[stage] = dict(model=net.name, steps=steps, seconds=seconds) | costs | metrics
    run.results[stage]["weights"] = model.fingerprint(net)


def score(run, stage, net, step, facts):
    """Metrics on the val split; every process scores its share of it."""
    metrics = evaluation.evaluate(
        net,
        run.val,
        facts,
        run.device,
        run.args.dtype,
        run.args.protocol,
        batch_size=run.args.eval_batch_size,
        parts=run.dataset.parts_of("val"),
    )
    run.print(f"{stage:7s} {step:6d} mIoU {evaluation.percent(metrics['miou'])}")
    run.log(stage=stage, step=step, miou=metrics["miou"], pixel_acc=metrics["pixel_acc"])
    return metrics


# ------------------------------------------------------------------------------------------------
# what a stage starts from, and its teacher


def start_from(run, stage, net, init):
    """Load the weights a stage starts from, unless it is resumed; returns their source.

    With --teacher-init auto a teacher starts from ImageNet weights if they are available.
    """
    if run.state and run.state["stage"] == stage:
        return run.inits[stage]
    auto = stage == "teacher" and init == "auto"
    if auto:
        init = IMAGENET.get(net.name) if run.dataset.name != "scenes" else "scratch"
    if init != "scratch":
        try:
            if init is None:
                raise UserError(f"There are no ImageNet weights of a {net.name}.")
            with only_first_prints(run):
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


def check_student_init(run):
    """UserError for weights that cannot be loaded: before the teacher's training, not after it."""
    args = run.args
    if args.teacher and "teacher" not in run.results and args.student_init != "scratch":
        with contextlib.redirect_stdout(None):
            net = model.build(args.student, len(run.dataset.classes))
            parallel.first_then_others(lambda: model.load_weights(net, args.student_init))


def find_teacher(run):
    """The teacher of --teacher-ckpt, scored like one trained here: (net, facts)."""
    net, facts = parallel.first_then_others(lambda: model.load(run.args.teacher_ckpt))
    with only_first_prints(run):
        try:
            catalog.check_classes(run.args.teacher_ckpt, net, facts, run.dataset)
        except UserError as e:
            other = f"--teacher {net.name} --teacher-init {run.args.teacher_ckpt}"
            raise UserError(f"{e}. To train it on these classes first, pass {other} instead") from e
    check_method(run.args, net)
    facts = catalog.complete(facts, net.num_classes, run.dataset)
    loop.check_same_net(run, "teacher", net, run.args.teacher_ckpt)
    loop.freeze(net, run.device)
    if "teacher" not in run.results:
        record(run, "teacher", net, facts, steps=0, seconds=0.0)
    return net, facts


def only_first_prints(run):
    """A context in which only process 0 prints."""
    return contextlib.nullcontext() if run.rank == 0 else contextlib.redirect_stdout(None)


# ------------------------------------------------------------------------------------------------
# the end of a run


def report(run, nets):
    """Write metrics.json and samples.png; print a table of teacher, student alone, student."""
    student = run.results["student"]
    cost = {k: student[k] for k in ("params", "gmacs", "attention_gmacs", "executed_gmacs")}
    loop.save_metrics(run, dict(miou=student["miou"], deployed=cost))
    head = f"{'params':>7s} {'GMACs':>7s} {'mIoU':>7s} {'pixel acc.':>11s} {'boundary IoU':>13s}"
    run.print(f"\n{'':34s} {head} {'time':>8s}")
    titles = dict(teacher="teacher", alone="student alone", student=f"student, {run.args.method}")
    for stage, r in run.results.items():
        title = f"{titles[stage]} ({r['model']})"
        shares = [evaluation.percent(r[k]) for k in ("miou", "pixel_acc", "boundary_iou")]
        run.print(
            f"{title:34s} {r['params'] / 1e6:6.2f}M {r['gmacs']:7.3g} {shares[0]:>7s} "
            f"{shares[1]:>11s} {shares[2]:>13s} {loop.clock(r['seconds']):>8s}"
        )
    h, w = run.augment.crop
    args, origin = run.args, f"student from {len(run.few)} of {len(run.train)} training images"
    if args.student_labels:
        origin += f", labels of {args.student_labels}"
    if args.unlabelled:
        origin += f", and {len(run.unlabelled)} without labels"
    if args.student_images or args.student_labels or args.unlabelled:
        run.print(origin)
    scored = f"{student['images']} val images, protocol {student['protocol']}"
    run.print(f"GMACs at {h}x{w}; {scored}")
    pictures(run, nets, ["photo", "labels", *(titles[s] for s in run.results)])
    run.print(f"wrote student.pt (to deploy), metrics.json and samples.png to {run.out}")


@torch.no_grad()
def pictures(run, nets, titles, rows=4, width=320):
    """Write samples.png: one row per image with the photo, its labels and each net's prediction."""
    grid = []
    for i in np.linspace(0, len(run.val) - 1, min(rows, len(run.val))).astype(int):
        image, label = run.val.pair(i)
        maps = []
        for net, facts in nets:
            x = evaluation.prepare(image, facts, facts["resize"]).to(run.device)
            maps.append(evaluation.predict_ids(net, x, label.shape)[0].cpu().numpy())
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
    loop.catch_signals(run)
    run.print(command_line(args))
    check_student_init(run)
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
    files.cli(main, get_args())
