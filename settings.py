"""
A run's options: defaults by data set, the paper's recipe, flags and their limits.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

import catalog
import cnn
import data
import methods
import model
import parallel
from files import UserError, as_flag

# Defaults for a first run on each data set. Flags override the recipe, the recipe these.
COMMON = dict(
    student="b0",
    teacher="b2",
    teacher_init="auto",
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
    class_weights="paper",
    label_stride=1,
    normalise="imagenet",
    protocol="full",
)
# the teacher learns from 800 drawn scenes, the student from 20: with few labels a teacher helps
SCENES = dict(student="nano", teacher="b0", student_images=20, alone=True, max_iters=900)
SCENES |= dict(crop_size=[96, 160], batch_size=8, lr=3e-3, scale=[0.75, 1.33])
STREET = dict(crop_size=[768], batch_size=8, max_iters=80_000)
DEFAULTS = dict.fromkeys(catalog.DATASETS, COMMON) | {
    "scenes": COMMON | SCENES,
    "camvid": COMMON | dict(crop_size=[352, 480]),
    "cityscapes": COMMON | STREET,
    "acdc": COMMON | STREET,
    "ade20k": COMMON | dict(max_iters=80_000, short_side=512),
    "cocostuff164k": COMMON | dict(max_iters=80_000, short_side=512),
    "cocostuff10k": COMMON | dict(short_side=512),
}
# TransKD as released. Beyond these flags: whole images, resized to a shorter side of 512, flipped
# and shifted by up to 2 pixels; weight decay on everything; lr * (1 - epoch / 1500), 1000 epochs.
PAPER = dict(batch_size=2, teacher_batch_size=8, lr=6e-5, warmup=0.0, clip=0.0, colour=0.0)
PAPER |= dict(class_weights="paper", csf_norm="batch", protocol="paper", dtype="float32")
PAPER |= dict(label_stride=4, normalise="none", short_side=None)
# where ImageNet weights are, on the hub or in torchvision
IMAGENET = {f"b{n}": f"nvidia/mit-b{n}" for n in range(6)} | cnn.MODELS
IMAGENET |= {f"pvt_v2_b{n}": f"OpenGVLab/pvt_v2_b{n}" for n in range(6)}
FINE_TUNING_LR = 6e-5  # low, so that pre-trained weights keep what they have learned
PAPER_EPOCHS = 1000
PAPER_DECIDES = ("short_side", "crop_size", "scale", "warmup")
OF_A_TEACHER = "teacher teacher_init teacher_lr teacher_iters teacher_batch_size".split()
# smallest and largest value of the flags that are numbers
LIMITS = dict.fromkeys(
    """max_iters teacher_iters batch_size teacher_batch_size accumulate student_images
    student_labels label_stride eval_batch_size""".split(),
    (1, 10**9),
)
LIMITS |= dict.fromkeys(
    """lr teacher_lr weight_decay clip colour seed eval_every save_every log_every
    cache_gb""".split(),
    (0, 10**9),
)
LIMITS |= dict(workers=(0, 256), short_side=(0, 8192), warmup=(0, 1), ema=(0, 0.99999))
LIMITS |= methods.limits()
# flags that may change when a run is resumed; all others may not
FREE = """out_dir data_dir cache cache_dir cache_gb resume workers device compile graphs eval_every
eval_batch_size save_every log_every""".split()


def get_args(argv=None):
    p = argparse.ArgumentParser(
        description="Train a teacher if there is none, and distil it into a student.",
        epilog="Defaults, unless DEFAULTS in settings.py has others for the data set: "
        + " ".join(as_typed(COMMON)),
        allow_abbrev=False,
    )
    yes_or_no = argparse.BooleanOptionalAction
    p.add_argument("--dataset", default="scenes", help=f"one of {', '.join(catalog.DATASETS)}")
    p.add_argument("--data-dir", help="the folder that holds it (default: data/NAME)")
    p.add_argument("--student", help=f"one of {', '.join(model.MODELS)}")
    p.add_argument(
        "--teacher",
        help=f"one of these, or {', '.join(cnn.MODELS)}; clearly better than the student",
    )
    p.add_argument(
        "--teacher-ckpt",
        help="a trained teacher to use instead: teacher.pt of a run, anybody's SegFormer, "
        "torchvision's DeepLabV3 or FCN: a file, a folder, a name on the Hugging Face hub, "
        "torchvision/NAME",
    )
    p.add_argument(
        "--teacher-init",
        help="scratch; weights: a file, a folder, a name on the hub, torchvision/NAME; auto (the "
        "default): ImageNet's, or scratch where these are unavailable, and for scenes",
    )
    p.add_argument("--student-init", default="scratch", help="scratch (the default), or weights")
    p.add_argument(
        "--method",
        default="transkd-base",
        help=f"{', '.join(methods.METHODS)} (default: transkd-base); a+b for both; list",
    )
    p.add_argument("--alone", action=yes_or_no, help="also train the student by itself")
    p.add_argument(
        "--student-images",
        type=int,
        help="only N of the training images (default: all; 20 of scenes)",
    )
    p.add_argument(
        "--student-labels",
        type=int,
        help="labels of only N of these; the other images serve --method only, as every second "
        "one of a batch, and the student alone does not use them",
    )
    p.add_argument(
        "--unlabelled",
        metavar="SPLIT",
        help="a split whose images are used in the same way, without labels even if it has some: "
        "of a folder, unlabelled (D/unlabelled.txt)",
    )
    p.add_argument(
        "--recipe",
        choices=("default", "paper"),
        default="default",
        help="paper: as TransKD's release: small batches, whole images; slow (PAPER, settings.py)",
    )
    methods.add_flags(p)
    add_training_flags(p)
    add_run_flags(p)
    return p.parse_args(argv)


def add_training_flags(p):
    """Flags for the length of training, the optimiser, the loss and augmentation."""
    p.add_argument("--max-iters", type=int, help="steps of each training")
    p.add_argument(
        "--teacher-iters", type=int, help="steps of the teacher's training (default: as many)"
    )
    p.add_argument("--batch-size", type=int, help="images per step, of all processes together")
    p.add_argument("--teacher-batch-size", type=int, help="the same, for the teacher")
    p.add_argument(
        "--accumulate", type=int, default=1, help="take a batch in N parts, to save memory"
    )
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument(
        "--teacher-lr",
        type=float,
        help=f"the same, for the teacher (default: --lr; from weights {FINE_TUNING_LR} at most)",
    )
    p.add_argument("--warmup", type=float, help="share of the steps in which the rate rises")
    p.add_argument("--weight-decay", type=float, help="of AdamW; vectors have none")
    p.add_argument("--clip", type=float, help="largest gradient norm; 0: no clipping")
    p.add_argument(
        "--ema",
        type=float,
        default=0.0,
        help="score and save a running average of the weights, with this decay, e.g. 0.999",
    )
    p.add_argument(
        "--class-weights",
        choices=("none", "paper"),
        help="paper: rare classes count more in the cross-entropy, as in TransKD, up to 8 times; "
        "none: all pixels alike, as most methods were published (c2vkd has no cross-entropy)",
    )
    # images
    p.add_argument(
        "--short-side",
        type=int,
        help="first resize all images to this shorter side, and in scoring those of val, but not "
        "their labels; for photos far larger than crops (default: 512 of ADE20K and COCO-Stuff, "
        "as published; 0: as they are)",
    )
    p.add_argument("--crop-size", type=int, nargs="+", help="height and width, or one for both")
    p.add_argument(
        "--scale", type=float, nargs=2, help="range of the random resize before the crop"
    )
    p.add_argument("--colour", type=float, help="strength of the colour changes; 0: none")
    p.add_argument(
        "--label-stride", type=int, help="labels, and the loss, at 1/N of the crop's size"
    )
    p.add_argument("--normalise", choices=("imagenet", "none"), help="none: RGB in [0, 1]")
    p.add_argument(
        "--protocol",
        choices=("full", "paper"),
        help="of scoring; full: at the size of the labels; paper: as in TransKD's release, images "
        "resized to a shorter side of 512, labels to a quarter of that",
    )


def add_run_flags(p, eval_batch_size=8):
    """Flags for a run's folder, cache, device, scoring, checkpoints and progress lines."""
    yes_or_no = argparse.BooleanOptionalAction
    p.add_argument("--out-dir", help="a new folder (default: in out/, named after what is trained)")
    p.add_argument("--resume", action="store_true", help="resume the run in --out-dir")
    p.add_argument("--cache", choices=("on", "off"), default="on", help="decode the files once")
    p.add_argument("--cache-dir", help="where to (default: .cache beside the data)")
    p.add_argument(
        "--cache-gb",
        type=float,
        help="cache no split larger than this (default: half the free disk)",
    )
    p.add_argument(
        "--workers",
        type=int,
        help="processes that prepare batches (default: spare cores, if useful)",
    )
    p.add_argument("--seed", type=int, default=0, help="of initial weights, batches and dropout")
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:N, cpu"
    )
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of autocast (default: what suits the device)",
    )
    p.add_argument("--compile", action=yes_or_no, default=False, help="torch.compile the training")
    p.add_argument(
        "--graphs",
        action=yes_or_no,
        default=False,
        help="replay a step as one CUDA graph: for small batches, the kernels of which a GPU "
        "computes faster than the host launches them",
    )
    p.add_argument("--eval-every", type=int, default=0, help="also score every N steps")
    p.add_argument(
        "--eval-batch-size", type=int, default=eval_batch_size, help="images of one size at a time"
    )
    p.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints")
    p.add_argument("--log-every", type=float, default=5, help="seconds between progress lines")


def resolve(args):
    """Fill in missing flags from the recipe and the data set's defaults, and check them all."""
    check_idle(args)
    args.data_dir = catalog.folder_of(args.dataset, args.data_dir)
    data.check_cache(args)
    defaults = dict(dtype=fast_dtype(args.device))
    defaults |= DEFAULTS[args.dataset] | (PAPER if args.recipe == "paper" else {})
    if args.method == "none":
        defaults["alone"] = False
    if args.method == "none" or args.teacher_ckpt:  # no teacher is trained
        defaults = {k: v for k, v in defaults.items() if k not in OF_A_TEACHER}
    if args.recipe == "paper":
        defaults.pop("max_iters")  # counted in epochs: open_run knows how long one is
    if "transkd" not in args.method or args.feature_loss == "none" or args.feature_weight == 0:
        defaults.pop("csf_norm", None)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out_dir = args.out_dir or f"out/{args.dataset}-{args.student}-{args.method}"
    for name, known in ((args.student, model.MODELS), (args.teacher, model.NAMES)):
        if name is not None and name not in known:
            raise UserError(f"unknown model '{name}': choose one of {', '.join(known)}")
    if not 1 <= len(args.crop_size) <= 2 or min(args.crop_size) < 32:
        raise UserError(f"--crop-size {args.crop_size}: one or two numbers, at least 32 each")
    deep_norms = any(name in args.method for name in ("transkd", "review"))
    if deep_norms and args.batch_size == args.accumulate and max(args.crop_size) < 64:
        raise UserError(
            "one image at a time needs a --crop-size of 64: the method's batch norms would get "
            "maps of 1x1"
        )
    if args.short_side and args.short_side < 32:
        raise UserError(f"--short-side {args.short_side}: at least 32, or 0 to leave images alone")
    if not 0.01 <= args.scale[0] <= args.scale[1] <= 100:
        raise UserError(f"--scale {args.scale}: two numbers from 0.01 to 100, the smaller first")
    if args.unlabelled in ("train", "val"):
        raise UserError(f"--unlabelled {args.unlabelled}: train and val have parts of their own")
    if args.unlabelled and args.method == "none":
        raise UserError("--unlabelled has no effect on --method none, which has no teacher")
    check_limits(args, LIMITS)
    if not args.teacher:
        return  # none, or a trained one, which find_teacher checks
    args.teacher_batch_size = args.teacher_batch_size or args.batch_size
    if args.teacher.startswith("deeplabv3") and args.teacher_batch_size == args.accumulate:
        limit = "cannot learn from one image at a time: --teacher-batch-size 2 at least"
        raise UserError(f"{args.teacher} normalises a map of 1x1 over the batch and {limit}")
    check_method(args)


def check_idle(args):
    """UserError for a flag that was given and has no effect beside others."""
    idle = []
    if args.recipe == "paper":
        idle += [(name, "--recipe paper") for name in PAPER_DECIDES]
    if args.method == "none":
        idle += [(name, "--method none") for name in ("teacher_ckpt", "alone", *OF_A_TEACHER)]
    elif args.teacher_ckpt:
        idle += [(name, "--teacher-ckpt") for name in OF_A_TEACHER]
    if args.dataset == "scenes":
        of_files = ("data_dir", "cache_dir", "cache_gb", "short_side")
        idle += [(name, "the drawn scenes") for name in of_files]
    for name, beside in idle:
        value = getattr(args, name)
        if value is not None and value is not False:
            raise UserError(f"{as_flag(name)} has no effect with {beside}")


def fast_dtype(device):
    """The --dtype that suits a device best."""
    device = parallel.get_device(device)
    if device.type == "cpu":
        return "float32"
    return "bfloat16" if parallel.has_native(device, "bfloat16") else "float16"


def check_limits(args, limits):
    """UserError for a number outside its (smallest, largest) value."""
    for name, (low, high) in limits.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise UserError(f"{as_flag(name)} {value}: must be {low} to {high}")


def method_of(args, name, net, teacher=None):
    """The method of this name between two nets, with those of its flags that were given."""
    options = methods.chosen(args) if name != "none" or args.method == "none" else {}
    return methods.build(name, net, teacher, **options)


def check_method(args, teacher=None):
    """UserError for flags and nets that do not go together, before any training."""
    with torch.device("meta"):
        teacher = teacher or model.build(args.teacher, 2)
        method_of(args, args.method, model.build(args.student, 2), teacher)


def recorded(args):
    """The flags that may not change when a run is resumed."""
    return {name: value for name, value in vars(args).items() if name not in FREE}


def command_line(args, script="train.py"):
    """The command with all defaults spelled out. script: where no file of the user's runs it."""
    started = Path(sys.argv[0]).name
    if started.endswith(".py") and not started.startswith("__"):  # as python -m pytest is
        script = started
    settings = recorded(args) | {name: getattr(args, name) for name in ("data_dir", "out_dir")}
    if getattr(args, "recipe", "") == "paper":
        settings = {k: v for k, v in settings.items() if k not in PAPER_DECIDES}
    return shlex.join(["python", script, *as_typed(settings)])


def as_typed(settings):
    """Settings as the words of a command."""
    words = []
    for name, value in settings.items():
        flag = as_flag(name)
        if isinstance(value, list):
            words += [flag, *map(str, value)]
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            words += [flag, str(value)]
    return words
