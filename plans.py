"""
What `suite.py` compares, and at what sizes: rows of tables as flags, plans as numbers.
"""

import methods
import pretrain

# ------------------------------------------------------------------------------------------------
# what is compared: group -> row -> flags of train.py beside those that all students share

TRANSKD = [name for name in methods.METHODS if name.startswith("transkd")]
ROWS = {
    "main": {
        "alone": "--method none",
        "alone, twice the steps": "--method none --max-iters {twice}",
        "alone, pre-trained": "--method none --student-init {student_init}",
        "alone, pre-trained, lower rate": "--method none --student-init {student_init} --lr {low}",
        "alone, pre-trained, twice the steps": (
            "--method none --student-init {student_init} --max-iters {twice}"
        ),
        "CSF alone": "--method transkd-base --embed none",
        "PEA alone": "--method transkd-base --feature-loss none",
    }
    | {name: f"--method {name}" for name in TRANSKD}
    | {
        "transkd-base, pre-trained": "--method transkd-base --student-init {student_init}",
        "transkd-base, twice the steps": "--method transkd-base --max-iters {twice}",
        "alone, four times the steps": "--method none --max-iters {four_times}",
    },
    "long": {
        "alone, eight times the steps": "--method none --max-iters {eight_times}",
        "alone, pre-trained, eight times the steps": (
            "--method none --student-init {student_init} --max-iters {eight_times}"
        ),
        "alone, pre-trained, four times the steps": (
            "--method none --student-init {student_init} --max-iters {four_times}"
        ),
        "transkd-base, four times the steps": "--method transkd-base --max-iters {four_times}",
        "transkd-base, eight times the steps": "--method transkd-base --max-iters {eight_times}",
        "transkd-base+cwd, eight times the steps": (
            "--method transkd-base+cwd --max-iters {eight_times}"
        ),
    },
    "labels": {
        f"{method.replace('none', 'alone')}, {share} % of the {what}": (
            f"--method {method} --student-{what} {{{count}}}"
        )
        for share, count in ((10, "tenth"), (25, "quarter"))
        for method, what in (
            ("none", "images"),
            ("transkd-base", "images"),
            ("transkd-base", "labels"),
            ("transkd-base+kd", "labels"),
        )
    },
    "ablations": {
        "and soft labels": "--method transkd-base+kd",
        "and cwd": "--method transkd-base+cwd",
        "features x 3": "--method transkd-base --feature-weight 3",
        "embeddings x 3": "--method transkd-base --embed-weight 3",
        "both x 3": "--method transkd-base --feature-weight 3 --embed-weight 3",
        "features x 1/3": "--method transkd-base --feature-weight 0.33",
        "embeddings x 1/3": "--method transkd-base --embed-weight 0.33",
        "both x 1/3": "--method transkd-base --feature-weight 0.33 --embed-weight 0.33",
        "features by CWD": "--method transkd-base --feature-loss cwd",
        "CSF's batch norm on 1x1 maps": "--method transkd-base --csf-norm batch",
        "labels at a quarter": "--method transkd-base --label-stride 4",
        "alone, labels at a quarter": "--method none --label-stride 4",
        "no mean and std": "--method transkd-base --normalise none",
        "alone, no mean and std": "--method none --normalise none",
        "weighted classes": "--method transkd-base --class-weights paper",
        "weighted classes, twice the steps": (
            "--method transkd-base --class-weights paper --max-iters {twice}"
        ),
        "alone, weighted classes": "--method none --class-weights paper",
    },
    "methods": {
        name: f"--method {name}" for name in methods.METHODS if name not in ["none", *TRANSKD]
    },
}
CLASSIFIERS = {  # row -> flags of pretrain.py
    "alone": "",
    "alone, twice the steps": "{twice}",
    "kd": "--method kd",
    "kd, no labels": "--method kd --ce-weight 0 --kd-weight 1",  # manifold+kd without manifold
} | {name: f"--method {name}" for name in pretrain.WEIGHTS if name != "none"}
GROUPS = [*ROWS, "photos"]  # the last: the classifiers
PLAIN = "--class-weights none"  # as most methods were published; single rows have weights
PAPER_TOO = ["alone", "alone, pre-trained", *TRANSKD]  # rows scored by the paper's protocol as well
# rows scored during training too
CURVES = ["alone", "alone, twice the steps", "alone, pre-trained", "transkd-base"]
LENGTHS = {  # one method at several lengths, of which only some are rows
    row: [row] + [f"{row}, {times} the steps" for times in ("twice", "four times", "eight times")]
    for row in ("alone", "alone, pre-trained", "transkd-base")
}

# ------------------------------------------------------------------------------------------------
# sizes and lengths

# 10 and 25 % of the images that a student has
LABELS = {"scenes": (2, 5), "camvid": (37, 92), "nyuv2": (80, 199), "folder": (1, 2)}


def numbers(plan, dataset):
    """What replaces the {braces} in the rows, for a data set."""
    sizes, (tenth, quarter) = plan["data"][dataset], LABELS[dataset]
    steps = sizes["steps"]
    lengths = dict(twice=2 * steps, four_times=4 * steps, eight_times=8 * steps)
    lengths |= dict(every=max(steps // 10, 2))
    return lengths | sizes | dict(tenth=tenth, quarter=quarter)


TINY = dict(
    note="A rehearsal of a few steps, which shows that everything runs and nothing else.",
    teacher="nano",
    student="nano",
    seeds=dict(main=2, long=1, labels=1, ablations=1, methods=1, photos=1),
    pretrain="--size 32 --batch-size 4 --max-iters 2",
    pairs={("nano", "nano"): "--max-iters 1", ("vit_tiny", "vit_tiny"): "--max-iters 1"},
    train="--batch-size 4 --crop-size 32",
    data=dict.fromkeys(
        ("folder", "camvid", "nyuv2"),
        dict(teacher="--max-iters 2", student="--max-iters {steps}", steps=4, low=1e-4),
    ),
)
REDUCED = dict(
    note="A reduced version, for two CPU cores: teacher MiT-B0 and student `nano`, an eighth of it "
    "in size, in place of B2 and B0, Tiny-ImageNet at 64x64 in place of ImageNet, small crops, few "
    "steps: no net is near what it could reach. It stands in for the full plan until that has run.",
    teacher="b0",
    student="nano",
    seeds=dict(main=3, long=3, labels=2, ablations=3, methods=3, photos=2),
    pretrain="--size 64 --batch-size 128 --epochs 10 --lr 1e-3 --area 0.3 1 --colour 0.2 "
    "--dtype bfloat16",
    mit="--drop-path 0",
    vit="--patch 16 --classes 20 --batch-size 64 --epochs 16 --lr 5e-4",
    pairs={("b0", "nano"): "--epochs 2", ("vit_small", "vit_tiny"): "--epochs 4"},
    train="--batch-size 8 --dtype bfloat16",
    also={"cirkd": "--cirkd-pixel-contrast 512 --cirkd-region-contrast 128"},
    data={
        "camvid": dict(
            teacher="--crop-size 176 240 --max-iters 2500 --lr 5e-4",
            student="--crop-size 176 240 --max-iters {steps} --lr 3e-3",
            steps=1000,
            low=1e-3,
        ),
        "nyuv2": dict(
            teacher="--crop-size 192 256 --max-iters 4000 --lr 5e-4",
            student="--crop-size 192 256 --max-iters {steps} --lr 3e-3",
            steps=1500,
            every=0,  # scoring takes a third of the time of training
            low=1e-3,
        ),
    },
)
SMALL = REDUCED | dict(
    note="A small version, for two CPU cores that know no bfloat16: teacher MiT-B0 and student "
    "`nano`, an eighth of it in size, float32, three epochs of Tiny-ImageNet at 64x64 in place of "
    "ImageNet, small crops, few steps: no net is near what it could reach. Vision transformers "
    "learn from 20 of its classes.",
    seeds=dict(main=2, long=0, labels=1, ablations=2, methods=1, photos=2),
    pretrain="--size 64 --batch-size 128 --epochs 3 --lr 1e-3 --area 0.3 1 --colour 0.2",
    pairs={("b0", "nano"): "--epochs 1", ("vit_small", "vit_tiny"): "--epochs 4"},
    train="--batch-size 8",
    data={
        "camvid": REDUCED["data"]["camvid"],
        "nyuv2": dict(
            teacher="--crop-size 192 256 --max-iters 2500 --lr 5e-4",
            student="--crop-size 192 256 --max-iters {steps} --lr 3e-3",
            steps=1000,
            every=0,
            low=1e-3,
        ),
    },
)
FULL = dict(
    note="",
    teacher="b2",
    student="b0",
    seeds=dict(main=3, long=0, labels=3, ablations=2, methods=3, photos=3),
    pretrain="--size 64 --batch-size 512 --epochs 100 --lr 1e-3 --mixup 0.8 --cutmix 1",
    pairs={("b2", "b0"): "--epochs 100", ("vit_small", "vit_tiny"): "--epochs 100"},
    train="--batch-size 16",
    data={
        "camvid": dict(
            teacher="--crop-size 352 480 --max-iters 10000 --lr 2e-4",
            student="--crop-size 352 480 --max-iters {steps} --lr 6e-4",
            steps=10000,
            low=2e-4,
        ),
        "nyuv2": dict(
            teacher="--crop-size 480 --max-iters 20000 --lr 2e-4",
            student="--crop-size 480 --max-iters {steps} --lr 6e-4",
            steps=20000,
            low=2e-4,
        ),
    },
)
SHORT = FULL | dict(
    note="A short version, for one large GPU: MiT-B2 and B0 as in the paper, but twelve epochs of "
    "Tiny-ImageNet at 64x64 in place of ImageNet, and few steps.",
    seeds=dict(main=3, long=0, labels=0, ablations=2, methods=0, photos=0),
    rows=dict(
        main=["alone", "alone, pre-trained", "transkd-base", "CSF alone", "PEA alone"]
        + ["alone, twice the steps", "alone, pre-trained, lower rate"]
        + ["transkd-gl", "transkd-ea", "transkd-base, twice the steps"],
        ablations=["and cwd", "weighted classes", "alone, weighted classes"],
    ),
    pretrain="--size 64 --batch-size 1024 --epochs 12 --lr 1e-3 --warmup 0.1 --area 0.3 1 "
    "--colour 0.2",
    pairs={},
    train="--batch-size 8",
    data={
        "camvid": dict(
            teacher="--crop-size 352 480 --batch-size 16 --max-iters 700 --lr 4e-4",
            student="--crop-size 352 480 --max-iters {steps} --lr 1e-3",
            steps=1500,
            every=0,
            low=3e-4,
        ),
        "nyuv2": dict(
            teacher="--crop-size 384 512 --batch-size 16 --max-iters 700 --lr 4e-4",
            student="--crop-size 384 512 --max-iters {steps} --lr 1e-3",
            steps=1500,
            every=0,
            low=3e-4,
        ),
    },
)
SCENES = dict(
    note="The drawn scenes of `python train.py`, which need no data. The teacher learns from all "
    "800, from scratch, the students from 20 of them, in float32.",
    teacher="b0",
    student="nano",
    init="scratch",
    seeds=dict(main=3, long=0, labels=0, ablations=3, methods=3, photos=0),
    rows=ROWS | dict(main=[row for row in ROWS["main"] if "pre-trained" not in row]),
    paper_too=[],  # it would enlarge them five times
    pairs={},
    train="--no-alone",
    also=REDUCED["also"],
    data={
        "scenes": dict(
            teacher="--student-images 800",
            student="--max-iters {steps}",
            steps=900,
            every=0,
        ),
    },
)
PLANS = dict(scenes=SCENES, tiny=TINY, small=SMALL, reduced=REDUCED, short=SHORT, full=FULL)
