"""
Your own ImageNet weights: an encoder trained as an image classifier, alone or with a teacher.

    python pretrain.py --data-dir D --model b0     # D/train/CLASS/*.jpg and D/val/CLASS/*.jpg
    python pretrain.py --data-dir D --model b0 --teacher out/b2/encoder.pt --method kd
    torchrun --nproc_per_node=8 pretrain.py --data-dir D --model b2 --batch-size 1024
    python train.py --teacher b2 --teacher-init out/b2/encoder.pt ...

Between classifiers, soft labels, manifold distillation and TaT are as in their papers; train.py's
are adapted to segmentation.
"""

import argparse
import functools
import math

import torch
import torch.nn.functional as F

import augment
import baselines
import classifiers
import data
import distill
import files
import loop
import manifold
import methods
import model
import parallel
import photos
import settings
import tat
from eval import autocast, percent
from files import UserError
from step import Learner, Teacher

METHODS = {
    "none": distill.NoDistillation,
    "kd": baselines.PixelKD,
    "manifold": manifold.Manifold,
    "tat": tat.WholeTaT,
}
# Weights as in the papers' commands: manifold+kd has no label loss; tat and tat+kd are two of them.
# Those of kd and manifold alone are ours.
WEIGHTS = {
    "none": dict(ce_weight=1.0),
    "kd": dict(ce_weight=0.5, kd_weight=0.5),
    "manifold": dict(ce_weight=1.0),
    "manifold+kd": dict(ce_weight=0.0, kd_weight=1.0),
    "tat": dict(ce_weight=0.1, tat_weight=0.2),
    "tat+kd": dict(ce_weight=0.5, kd_weight=0.5, tat_weight=0.1),
}
FLAGS = {
    name: flag
    for name, flag in methods.FLAGS.items()
    if name in ("temperature", "tat_axis") or name.startswith("manifold_")
}
FLAGS |= {
    "tat_weight": (methods.WEIGHT, "of tat; as published 0.2, and with kd 0.1"),
    "kd_weight": (methods.WEIGHT, "of the soft labels (default: 0.5; with manifold 1)"),
}
LIMITS = settings.LIMITS | methods.limits(FLAGS)
LIMITS |= dict.fromkeys("ce_weight mixup cutmix".split(), (0, 1e9))
LIMITS |= dict.fromkeys("label_smoothing drop_path".split(), (0, 0.999))
LIMITS |= dict.fromkeys("size store patch".split(), (1, 4096))
LIMITS |= dict(epochs=(1e-9, 1e9), classes=(2, 10**9))


def get_args(argv=None):
    p = argparse.ArgumentParser(
        description="Train an image classifier, to start segmentation from its encoder.",
        allow_abbrev=False,
    )
    p.add_argument("--data-dir", required=True, help="holds train/CLASS/*.jpg and val/CLASS/*.jpg")
    p.add_argument(
        "--classes", type=int, help="use only N classes, the first by name (default: all)"
    )
    p.add_argument("--model", default="b0", help=f"one of {', '.join(classifiers.NAMES)}")
    p.add_argument("--size", type=int, default=224, help="height and width of the net's input")
    p.add_argument(
        "--store",
        type=int,
        help="shorter side to which larger photos are shrunk when read: windows are cut from "
        "these, and their middle is scored (default: 8/7 of --size)",
    )
    p.add_argument(
        "--patch", type=int, help="of a ViT, side in pixels (default: 16; 8 for --size below 128)"
    )
    p.add_argument(
        "--drop-path",
        type=float,
        help="rate of stochastic depth, not for a ViT (default: 0.1; lvt: 0)",
    )
    # distillation
    p.add_argument("--teacher", help="encoder.pt of a classifier of the same classes")
    p.add_argument("--method", default="none", help=f"how to distil: {', '.join(WEIGHTS)}")
    p.add_argument(
        "--ce-weight",
        type=float,
        help="weight of the labels' cross-entropy (default: 1; kd 0.5, tat 0.1, tat+kd 0.5, "
        "manifold+kd 0)",
    )
    methods.add_flags(p, FLAGS)
    # how long, how fast
    p.add_argument("--epochs", type=float, help="passes over the training photos (default: 100)")
    p.add_argument("--max-iters", type=int, help="number of steps, in place of --epochs")
    p.add_argument("--batch-size", type=int, default=256, help="photos per step, of all processes")
    p.add_argument(
        "--accumulate", type=int, default=1, help="take a batch in N parts, to save memory"
    )
    p.add_argument(
        "--lr", type=float, help="peak learning rate (default: 5e-4 * batch size / 512, as DeiT)"
    )
    p.add_argument("--warmup", type=float, default=0.05, help="share of steps with a rising rate")
    p.add_argument(
        "--decay", choices=("cosine", "linear"), default="cosine", help="of the learning rate"
    )
    p.add_argument("--weight-decay", type=float, default=0.05, help="of AdamW, not on vectors")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    p.add_argument(
        "--label-smoothing",
        type=float,
        help="of the cross-entropy, unless its weight is 0 (default: 0.1)",
    )
    add_augmentation_flags(p)
    settings.add_run_flags(p, eval_batch_size=64)
    return p.parse_args(argv)


def add_augmentation_flags(p):
    """Flags for random windows, colour changes and mixing."""
    p.add_argument(
        "--area",
        type=float,
        nargs=2,
        default=[0.08, 1.0],
        help="range of a random window's area, as a share of the photo's",
    )
    p.add_argument("--colour", type=float, default=0.5, help="strength of colour changes; 0: none")
    p.add_argument("--mixup", type=float, default=0.0, help="A of Beta(A, A), e.g. 0.8; 0: none")
    p.add_argument(
        "--cutmix", type=float, default=0.0, help="likewise, e.g. 1; with both, one at random"
    )


def resolve(args):
    """Fill in what was not given, and check what can be checked before the data."""
    settings.check_limits(args, LIMITS)
    data.check_cache(args)
    if args.method not in WEIGHTS:
        raise UserError(f"unknown method '{args.method}': choose one of {', '.join(WEIGHTS)}")
    if args.teacher and args.method == "none":
        raise UserError("--teacher: what it is to teach is missing, pass --method too")
    if not args.teacher and args.method != "none":
        raise UserError("--method: who teaches it is missing, pass --teacher too")
    if args.epochs and args.max_iters:
        raise UserError("--epochs has no effect with --max-iters: pass one of them")
    if not 0 < args.area[0] <= args.area[1] <= 1:
        raise UserError(f"--area {args.area}: two shares up to 1, the smaller first")
    args.store = args.store or round(args.size * 8 / 7)
    if args.store < args.size:
        raise UserError(f"--store {args.store}: less than the --size of {args.size}")
    for name, value in WEIGHTS[args.method].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if "tat" in args.method and args.batch_size == args.accumulate and args.size < 64:
        raise UserError("tat with one photo at a time needs a --size of 64, for its batch norms")
    if not args.ce_weight:
        if "kd" not in args.method or not args.kd_weight:
            raise UserError("--ce-weight 0 and no soft labels: the classifier learns from nothing")
        if args.label_smoothing:
            raise UserError("--label-smoothing has no effect with --ce-weight 0")
    if args.label_smoothing is None:
        args.label_smoothing = 0.1 if args.ce_weight else 0.0
    args.dtype = args.dtype or settings.fast_dtype(args.device)
    if args.lr is None:
        args.lr = 5e-4 * args.batch_size / 512
    args.out_dir = args.out_dir or f"out/pretrain-{args.model}-{args.size}-{args.method}"
    with torch.device("meta"):
        net = classifiers.build(args.model, 2, args.size, args.patch, args.drop_path)
        method_of(args, net, net)
    if args.model in classifiers.VITS:
        args.patch = args.patch or classifiers.default_patch(args.size)


# ------------------------------------------------------------------------------------------------
# the run


def open_run(args):
    """(run, its photos to learn from, those to score); resumes the run in --out-dir if asked."""
    common = loop.start(args, [args.batch_size], ("encoder.pt",))
    if (args.mixup or args.cutmix) and args.batch_size // args.accumulate // common["world"] % 2:
        raise UserError("--mixup and --cutmix take photos in pairs: an even number per process")
    options = args.store, args.cache, args.cache_dir, args.cache_gb, args.classes
    train, val = parallel.first_then_others(lambda: photos.open_splits(args.data_dir, *options))
    if args.workers is None:
        busy = common["device"].type == "cuda" or not train.packed  # decoding takes the time
        args.workers = parallel.spare_cores() if busy else 0
    if not args.max_iters:
        args.max_iters = math.ceil((args.epochs or 100) * len(train) / args.batch_size)
        args.epochs = None
    loop.claim(common["out"], common["rank"])
    identity = dict(classes=train.classes, train=len(train), val=len(val))
    identity["checksum of names and sizes"] = photos.fingerprint(train, val)
    run = loop.Run(args=args, data=identity, **common)
    if args.resume:
        loop.resume(run)
    return run, train, val


def open_teacher(args):
    """The classifier of --teacher and its classes; UserError if it cannot teach here."""
    net, facts = classifiers.load(args.teacher)
    vits = [name in classifiers.VITS for name in (net.name, args.model)]
    if vits[0] and facts["size"] != args.size:
        raise UserError(f"{args.teacher}: a {net.name} for --size {facts['size']} only")
    if "manifold" in args.method and vits[0] != vits[1]:
        raise UserError(f"manifold compares blocks, or stages: no {args.model} with a {net.name}")
    return net, facts["classes"]


def method_of(args, net, teacher):
    """The method of --method between two classifiers; between ViTs manifold compares BLOCKS."""
    options = methods.chosen(args, FLAGS)
    if "manifold" in args.method and net.name in classifiers.VITS:
        if args.manifold_stages:
            raise UserError(f"--manifold-stages has no effect on {net.name}: it has no stages")
        options["manifold_stages"] = range(1, len(classifiers.BLOCKS) + 1)
    channels = net.channels, teacher and teacher.channels
    return methods.build_method(args.method, *channels, METHODS, **options)


def cross_entropy(logits, targets, weight, smoothing):
    """Weighted CE of logits (B, K) and targets (B, K), the shares of the classes."""
    return weight * F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def train_classifier(run, net, teacher, train, val):
    """Train `net`; returns the seconds it took."""
    args = run.args
    method = method_of(args, net, teacher)
    ce = functools.partial(cross_entropy, weight=args.ce_weight, smoothing=args.label_smoothing)
    learner = Learner(net, method, ce if args.ce_weight else None)
    mean, std = model.IMAGENET_MEAN, model.IMAGENET_STD
    facts = dict(mean=mean, std=std, void=None)
    frozen = None
    if teacher:
        frozen = Teacher(teacher, facts, mean, std, method.needs_head, args.dtype).to(run.device)
    parts = loop.trained_parts(run, learner, frozen, args.lr)
    crops = photos.Crops(args.size, tuple(args.area), args.colour, args.mixup, args.cutmix)
    part_size = args.batch_size // args.accumulate
    batches = augment.Batches(
        train, part_size, args.seed, crops, run.rank, run.world, photos.host_batch
    )
    mixed = bool(args.mixup or args.cutmix)
    shared = dict(device=run.device, num_classes=len(train.classes), mixed=mixed)
    prepare = functools.partial(photos.device_batch, **shared)
    schedule = dict(peak=args.lr, total=args.max_iters, warmup=args.warmup, decay=args.decay)
    scoring = functools.partial(score, run, val, "encoder")
    return loop.run_steps(run, "encoder", parts, batches, prepare, frozen, schedule, scoring)


def hits(logits, labels, k):
    """How many rows of logits (B, K) have their label (B,) among the k largest."""
    best = logits.topk(min(k, logits.shape[1])).indices  # (B, k)
    return (best == labels[:, None]).any(dim=1).sum()


@torch.no_grad()
def score(run, val, stage, net, step):
    """Top-1 and top-5 accuracy on val; every process scores its share of it."""
    args = run.args
    middles = photos.Middles(val, args.size, args.eval_batch_size, run.rank, run.world)
    found, training = torch.zeros(3, dtype=torch.float64), net.training
    net.eval()
    for batch in loop.load(middles, range(len(middles)), args.workers, run.device):
        images, labels = (batch[k].to(run.device, non_blocking=True) for k in ("image", "label"))
        images = images.permute(0, 3, 1, 2).float() / 255  # channels-last (B, 3, S, S)
        images = augment.normalise(images, model.IMAGENET_MEAN, model.IMAGENET_STD)
        with autocast(run.device, args.dtype):
            logits = net(images).logits.float()
        found += torch.stack([hits(logits, labels, k) for k in (1, 5, logits.shape[1])]).cpu()
    net.train(training)
    top1, top5, n = parallel.process_mean(found).tolist()
    metrics = dict(top1=top1 / n, top5=top5 / n, images=round(n * run.world))
    shares = f"top-1 {percent(metrics['top1'])}  top-5 {percent(metrics['top5'])}"
    run.print(f"{stage:7s} {step:6d} {shares}")
    run.log(stage=stage, step=step, **metrics)
    return metrics


def main(args):
    resolve(args)
    teacher, theirs = open_teacher(args) if args.teacher else (None, None)
    run, train, val = open_run(args)
    loop.catch_signals(run)
    run.print(settings.command_line(args, "pretrain.py"))
    classes = train.classes
    run.print(f"{len(train)} photos to learn from, {len(val)} to score, {len(classes)} classes")
    if teacher:
        if theirs != classes:
            raise UserError(
                f"{args.teacher}: knows {len(theirs)} classes ({files.some(theirs, 3)}), "
                f"{args.data_dir} has {len(classes)} ({files.some(classes, 3)})"
            )
        loop.freeze(teacher, run.device)
    torch.manual_seed(args.seed)
    net = classifiers.build(args.model, len(classes), args.size, args.patch, args.drop_path)
    params = model.count_parameters(net)
    if teacher and "teacher" in run.results:
        loop.check_same_net(run, "teacher", teacher, args.teacher)
    elif teacher:
        found = dict(model=teacher.name, weights=model.fingerprint(teacher))
        run.results["teacher"] = found | score(run, val, "teacher", teacher, 0)
    run.print(f"{args.model}, {params:,} parameters: {args.max_iters} steps of {args.batch_size}")
    if "encoder" not in run.results:
        seconds = train_classifier(run, net, teacher, train, val)
        made = dict(model=args.model, params=params, steps=args.max_iters, seconds=seconds)
        made |= dict(weights=model.fingerprint(net))
        run.results["encoder"] = made | score(run, val, "encoder", net, args.max_iters)
        if run.rank == 0:
            facts = dict(classes=classes, size=args.size, patch=args.patch, dtype=args.dtype)
            facts |= dict(mean=list(model.IMAGENET_MEAN), std=list(model.IMAGENET_STD))
            classifiers.save(run.out / "encoder.pt", net, **facts)
        loop.save_state(run)
    else:
        path = run.out / "encoder.pt"
        loop.check_same_net(run, "encoder", classifiers.load(path)[0], path)
    if run.rank == 0:
        result = run.results["encoder"]
        loop.save_metrics(run, dict(top1=result["top1"], top5=result["top5"]))
    run.print(f"wrote encoder.pt (for --teacher-init, --student-init, --teacher) to {run.out}")
    parallel.stop()


if __name__ == "__main__":
    files.cli(main, get_args())
