"""
Every method by its name: its paper, its flags, and how it is built for two nets.
"""

import inspect

from torch import nn

import baselines
import distill
from files import UserError, as_flag

METHODS = distill.METHODS | baselines.METHODS
PAPERS = {
    "none": "the student alone",
    "transkd-base": "TransKD: Liu et al., T-ITS 2024, arXiv 2202.13393",
    "transkd-gl": "TransKD with the Global-Local context Mixer",
    "transkd-ea": "TransKD with the Embedding Assistant",
    "tat": "Target-aware transformer: Lin et al., CVPR 2022, arXiv 2205.10793",
    "manifold": "Fine-grained manifold distillation: Hao et al., NeurIPS 2022, arXiv 2107.01378",
    "c2vkd": "C2VKD: Zheng et al., arXiv 2310.07265; a reconstruction",
    "kd": "Soft labels of every pixel: Hinton et al., arXiv 1503.02531",
    "fitnet": "FitNets: Romero et al., ICLR 2015, arXiv 1412.6550",
    "at": "Attention transfer: Zagoruyko & Komodakis, ICLR 2017, arXiv 1612.03928",
    "cwd": "Channel-wise distillation: Shu et al., ICCV 2021, arXiv 2011.13256",
    "review": "Knowledge review: Chen et al., CVPR 2021, arXiv 2104.09044",
    "skd": "Structured KD, pair-wise term: Liu et al., CVPR 2019, arXiv 1903.04197",
    "ifvd": "Intra-class feature variation: Wang et al., ECCV 2020",
    "dsd": "Double similarity distillation: Feng et al., TIP 2021",
    "cirkd": "Cross-image relational KD: Yang et al., CVPR 2022, arXiv 2204.06986",
}

WEIGHT = (float, 0, 1e9)
COUNT = (int, 1, 10**9)
# flag, named as the parameter of the method's __init__: what it takes, what it does; if not given,
# the method's default holds. It takes one of (choices), a number (type, least, most), several of
# [choices], bool: nothing, str: a file
FLAGS = {
    "csf_norm": (
        ("none", "batch"),
        "batch: CSF exactly as released, with its batch norm of 1x1 maps",
    ),
    "feature_loss": (
        tuple(distill.FEATURE_LOSSES),
        "how TransKD compares feature maps; none: PEA alone",
    ),
    "embed": (
        tuple(distill.EMBED_STAGES),
        "stages whose patch embeddings TransKD aligns; none: CSF alone",
    ),
    "feature_weight": (WEIGHT, "factor of TransKD's feature terms"),
    "embed_weight": (WEIGHT, "factor of TransKD's embedding terms"),
    "gl_init": ((float, -1e9, 1e9), "start of GL-Mixer's two scalars"),
    "gl_residual": (bool, "GL-Mixer adds its input, as an option of the authors' code does"),
    "tat_axis": (("teacher", "student"), "whose positions TaT's softmax runs over"),
    "tat_patch": (COUNT, "positions along a side of TaT's patches"),
    "tat_group": (COUNT, "patches that TaT stacks to a group"),
    "tat_anchors": (COUNT, "anchor points along a side"),
    "tat_patch_weight": (WEIGHT, "weight of the patch groups"),
    "tat_anchor_weight": (WEIGHT, "weight of the anchor points"),
    "manifold_stages": ([1, 2, 3, 4], "stages whose tokens are compared"),
    "manifold_patch_weight": (WEIGHT, "weight of relations between tokens of one image"),
    "manifold_sample_weight": (WEIGHT, "weight of relations between images at one position"),
    "manifold_random_weight": (WEIGHT, "weight of relations between tokens drawn at random"),
    "manifold_rows": (COUNT, "how many tokens are drawn"),
    "c2vkd_pdd": (
        ("binary", "dkd"),
        "which reading of PDD: label against all else, or DKD's two parts",
    ),
    "c2vkd_alpha": (WEIGHT, "weight of the label's part of PDD"),
    "c2vkd_beta": (WEIGHT, "weight of the other classes' part of PDD"),
    "c2vkd_ce": (bool, "add the cross-entropy, which the release leaves out"),
    "c2vkd_global": (WEIGHT, "weight of the maps' KL over channels"),
    "c2vkd_graph": (WEIGHT, "weight of their Gram matrices' term"),
    "c2vkd_language": (WEIGHT, "weight of the linguistic term"),
    "c2vkd_clip": (
        str,
        "file with CLIP's visual.attnpool tensors; without it there is no linguistic term",
    ),
    "kd_weight": (WEIGHT, "weight of the soft labels' term"),
    "temperature": ((float, 1e-3, 1e3), "of kd's softmax: higher, softer"),
    "fitnet_weight": (WEIGHT, "weight of fitnet's term"),
    "fitnet_layer": (
        ("decoded", "1", "2", "3", "4"),
        "which maps it compares: the decoded ones, or a stage's",
    ),
    "at_weight": (WEIGHT, "weight of at's term"),
    "cwd_feature_weight": (WEIGHT, "weight of cwd's term of the decoded maps"),
    "cwd_logit_weight": (WEIGHT, "weight of cwd's term of the logits"),
    "cwd_temperature": ((float, 1e-3, 1e3), "of cwd's softmax over positions"),
    "review_weight": (WEIGHT, "weight of review's term"),
    "skd_weight": (WEIGHT, "weight of skd's pair-wise term"),
    "ifvd_weight": (WEIGHT, "weight of ifvd's term"),
    "dsd_psd_weight": (WEIGHT, "weight of dsd's pixel-wise term"),
    "dsd_csd_weight": (WEIGHT, "weight of dsd's category-wise term"),
    "cirkd_batch_weight": (WEIGHT, "weight of cirkd's term within the batch"),
    "cirkd_pixel_weight": (WEIGHT, "weight of the term of its queues of pixels"),
    "cirkd_region_weight": (WEIGHT, "weight of the term of its queues of regions"),
    "cirkd_pool": (COUNT, "side of the squares of pixels averaged for the term within the batch"),
    "cirkd_pixel_queue": (COUNT, "pixels remembered per class"),
    "cirkd_region_queue": (COUNT, "regions remembered per class"),
    "cirkd_pixel_contrast": (COUNT, "how many remembered pixels a step compares with"),
    "cirkd_region_contrast": (COUNT, "how many remembered regions a step compares with"),
}
# option: the weight of the term that it belongs to, without which it has no effect
ACTS_BY = {
    "tat_patch": "tat_patch_weight",
    "tat_group": "tat_patch_weight",
    "tat_anchors": "tat_anchor_weight",
    "manifold_rows": "manifold_random_weight",
    "c2vkd_clip": "c2vkd_language",
    "cirkd_pool": "cirkd_batch_weight",
    "cirkd_pixel_queue": "cirkd_pixel_weight",
    "cirkd_pixel_contrast": "cirkd_pixel_weight",
    "cirkd_region_queue": "cirkd_region_weight",
    "cirkd_region_contrast": "cirkd_region_weight",
}


def add_flags(parser, flags=FLAGS):
    """Add a command-line flag for each option of the methods."""
    group = parser.add_argument_group("options of single methods")
    parameters = [p for m in METHODS.values() for p in inspect.signature(m).parameters.values()]
    defaults = {p.name: p.default for p in parameters}
    for name, (kind, text) in flags.items():
        default = defaults.get(name)
        default = default[0] if isinstance(default, tuple) else default
        if default and "default" not in text:
            text += f" (default {default if isinstance(default, str) else format(default, 'g')})"
        if kind is bool:
            options = dict(action="store_const", const=True)
        elif kind is str:
            options = dict(metavar="FILE")
        elif isinstance(kind, list):
            options = dict(type=type(kind[0]), choices=kind, nargs="+")
        elif isinstance(kind[0], type):
            options = dict(type=kind[0], metavar=kind[0].__name__.upper())
        else:
            options = dict(choices=kind)
        group.add_argument(as_flag(name), help=text, **options)


def limits(flags=FLAGS):
    """Smallest and largest value of the flags that are numbers."""
    numbers = {name: kind for name, (kind, _) in flags.items() if isinstance(kind, tuple)}
    return {name: kind[1:] for name, kind in numbers.items() if isinstance(kind[0], type)}


def chosen(args, flags=FLAGS):
    """The methods' flags that were given."""
    return {name: getattr(args, name) for name in flags if getattr(args, name) is not None}


class Together(distill.Method):
    """Several methods at once: `--method a+b`."""

    def __init__(self, methods):
        super().__init__()
        self.methods = nn.ModuleDict(methods)
        self.needs_teacher = any(m.needs_teacher for m in methods.values())
        self.needs_head = any(m.needs_head for m in methods.values())
        self.replaces_ce = any(m.replaces_ce for m in methods.values())

    def forward(self, student, teacher, images, labels):
        terms = {}
        for name, method in self.methods.items():
            for term, value in method(student, teacher, images, labels).items():
                terms[f"{name}/{term}"] = value
        return terms


def build_method(
    spec,
    student_channels,
    teacher_channels,
    methods=METHODS,
    widths=None,
    classes=None,
    has_embeddings=True,
    **options,
):
    """The method named by `spec`, "a" or "a+b", with those of `options` that it takes.

    For the methods that ask for them: widths, the channels of the decoded map of student and
    teacher; classes, the number of classes; has_embeddings, whether the teacher has patch
    embeddings.
    Raises UserError for an unknown name and for an option that none of the named methods takes.
    """
    names = spec.split("+")
    unknown = [name for name in names if name not in methods]
    if unknown:
        raise UserError(f"unknown method '{unknown[0]}': choose among {', '.join(methods)}")
    if "none" in names and len(names) > 1:
        raise UserError(f"method '{spec}': none goes with no other")
    if len(set(names)) < len(names):
        raise UserError(f"method '{spec}' names one method twice")
    nets = dict(widths=widths, classes=classes, has_embeddings=has_embeddings)
    taken, built = set(), {}
    for name in names:
        parameters = inspect.signature(methods[name]).parameters.keys()
        mine = options.keys() & parameters
        own = {k: options[k] for k in mine} | {k: nets[k] for k in nets.keys() & parameters}
        built[name] = methods[name](student_channels, teacher_channels, **own)
        taken |= mine
        weights = [k for k in parameters if k.endswith("_weight")]
        if weights and all(options.get(k) == 0 for k in weights):
            raise UserError(f"{name}: {', '.join(map(as_flag, weights))} 0: nothing to learn from")
    for option, weight in ACTS_BY.items():
        if option in options and options.get(weight) == 0:
            raise UserError(f"{as_flag(option)} has no effect with {as_flag(weight)} 0")
    for option in options.keys() - taken:
        raise UserError(f"{as_flag(option)} has no effect on --method {spec}")
    return built[names[0]] if len(names) == 1 else Together(built)


def build(spec, net, teacher=None, **options):
    """The method named by spec ("a" or "a+b") that distils `teacher` into `net`."""
    facts = dict(widths=(net.width, teacher and teacher.width), classes=net.num_classes)
    facts["has_embeddings"] = teacher is None or teacher.has_embeddings
    channels = teacher and teacher.channels
    return build_method(spec, net.channels, channels, METHODS, **facts, **options)
