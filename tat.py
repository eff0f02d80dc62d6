"""
TaT, the target-aware transformer (Lin et al., "Knowledge Distillation via the Target-aware
Transformer", CVPR 2022, arXiv 2205.10793): each teacher position from all student positions.

Comparing two feature maps position by position assumes that both networks represent the same thing
at the same place. TaT lets attention find the place, and rebuilds the teacher's map from the
student's:

    q = norm(conv(s))    v = norm(conv(s))    k = norm(conv(t))      1x1, to the teacher's channels
    L(q, k, v, t) = mean of (softmax(q k^T) v - t)^2                 t itself, not its embedding

The softmax runs over the teacher's positions, as in the released code; what the title says would
need the student's (`--tat-axis student`, see TaT).

The similarities q k^T have one row and one column per position: (H * W)^2 numbers. Two cheaper
views of the same maps are used instead, one for detail, one for context:

    patch groups    the map is cut into patches; p patches are stacked on the channel axis, and
                    positions are compared within such a group: cost linear in H * W
    anchor points   the map is average-pooled to a fixed number of points, and these are compared

    L = CE + 1.6 * L(patch groups) + 0.64 * L(anchor points)

An image classifier's last map is small enough to compare whole: WholeTaT, for pretrain.py.
"""

import torch.nn.functional as F
from torch import nn

from distill import Method, conv_bn, matched, to_grid
from model import to_tokens
from nets import full_precision


def conv_norm(c_in, c_out):
    """1x1 convolution and affine instance norm.

    The authors use a batch norm, but call it on one image at a time: the same function.
    """
    conv = nn.Conv2d(c_in, c_out, 1, bias=False)
    return nn.Sequential(conv, nn.InstanceNorm2d(c_out, eps=1e-5, affine=True))


def rebuild(q, k, v, axis):
    """Student values v, mixed by the similarities of student q, teacher k: all (G, P, D), that is
    G groups of P positions with D channels, each compared within itself.

    No 1 / sqrt(D): the norms make similarities large, so that attention is close to a hard
    selection.
    """
    similarity = q @ k.mT  # (G, P, P): rows are student positions, columns the teacher's
    if axis == "student":
        similarity = similarity.mT
    return similarity.softmax(dim=2) @ v


def patch_groups(x, patch, group):
    """Map (B, C, H, W) -> [(B * g, h * w, p * C), ...]: patches of h x w, p of them stacked to each
    of g groups.

    There are n = H // patch rows of patches (at least one) of height h = H // n, and columns
    likewise: `patch` on large maps, less than twice that on small ones. Leftover rows and columns
    are dropped. Patches are grouped in row-major order, `group` at a time; the rest form a smaller
    group.
    """
    B, C, H, W = x.shape
    n, m = max(1, H // patch), max(1, W // patch)
    h, w = H // n, W // m
    x = x[:, :, : n * h, : m * w].reshape(B, C, n, h, m, w)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, n, m, h, w, C)
    x = x.reshape(B, n * m, h * w, C)
    rest, groups = n * m % group, []
    for part in x.split([n * m - rest, rest], dim=1):
        if part.shape[1]:
            part = part.unflatten(1, (-1, min(group, part.shape[1])))  # (B, g, p, h * w, C)
            part = part.transpose(2, 3).flatten(3)  # (B, g, h * w, p * C)
            groups.append(part.flatten(0, 1))
    return groups


def anchor_points(x, anchors):
    """Map (B, C, H, W) -> [(B, A, C)]: averages over windows, about `anchors` of them per side.

    A window's sides are H / anchors and W / anchors, rounded, at least 1. (The release rounds down:
    up to four times as many points, and an error on maps with fewer positions along a side.)
    """
    window = [max(1, (n + anchors // 2) // anchors) for n in x.shape[2:]]
    return [to_tokens(F.avg_pool2d(x, window))]


class TaT(Method):
    """Patch-group and anchor-point terms between the `decoded` maps of student and teacher.

    The student's map s is average-pooled to half its size, rounded up (stride 8); the teacher's map
    t is brought to the same grid by `to_grid`. All three embeddings are trained, the teacher's too.

    tat_axis: whose positions the softmax runs over. "teacher": sum_j softmax_j(q_i k_j) v_j is
    compared with t_i, as in the code that the authors released. "student": as their text explains
    it, sum_j softmax_j(k_i q_j) v_j: only then does position i of the teacher choose among
    those of the student, and only then can a student whose positions are permuted be matched.
    tat_patch, tat_group: positions along a patch's side, and patches per group.
    tat_anchors: anchor points per side; with 32, every position of a map below 48x48 is an anchor
    of its own. All three are as published for ResNet-18 on VOC, on maps of 129x129.
    tat_patch_weight, tat_anchor_weight: that run's weights are 0.1 and 0.1 * 0.4 with batches of
    16, but its code divides the cross-entropy, already a mean, by the batch size once more.
    Relative to an ordinary mean they are 16 times larger: 1.6 and 0.64.

    The authors' teacher runs in training mode; ours does not, as in all methods here.
    """

    def __init__(
        self,
        student_channels,
        teacher_channels,
        widths,
        tat_axis="teacher",
        tat_patch=8,
        tat_group=4,
        tat_anchors=32,
        tat_patch_weight=1.6,
        tat_anchor_weight=0.64,
    ):
        super().__init__()
        self.axis, self.patch, self.group = tat_axis, tat_patch, tat_group
        self.anchors = tat_anchors
        self.patch_weight, self.anchor_weight = tat_patch_weight, tat_anchor_weight
        student, teacher = widths
        self.query, self.value = conv_norm(student, teacher), conv_norm(student, teacher)
        self.key = conv_norm(teacher, teacher)

    def mismatch(self, q, k, v, t):
        """Mean of (rebuilt - t)^2 over all groups; each argument is a list of (G, P, D)."""
        errors = [(rebuild(*qkv, self.axis) - g).square().sum() for *qkv, g in zip(q, k, v, t)]
        return sum(errors) / sum(g.numel() for g in t)

    def forward(self, student, teacher, images, labels):
        with full_precision(student.decoded):
            size = [(n + 1) // 2 for n in student.decoded.shape[2:]]
            s, t = (to_grid(out.decoded.float(), size) for out in (student, teacher))
            maps = self.query(s), self.key(t), self.value(s), t  # (B, teacher's width, h, w)
            terms = {}
            if self.patch_weight:
                groups = (patch_groups(x, self.patch, self.group) for x in maps)
                terms["patches"] = self.patch_weight * self.mismatch(*groups)
            if self.anchor_weight:
                points = (anchor_points(x, self.anchors) for x in maps)
                terms["anchors"] = self.anchor_weight * self.mismatch(*points)
        return terms


class WholeTaT(Method):
    """The ImageNet variant: all positions of the last map at once, t its own key and target.

        q = BN(Conv3x3(s))    v = BN(Conv3x3(s))    k = t    tat_weight * L(q, k, v, t)

    The last maps (B, C_s, h, w) and (B, C_t, H, W) are compared, the teacher's at the student's
    size. The authors' two commands use 0.1 CE + 0.2 TaT, and 0.5 CE + 0.5 KL (T = 1)
    + 0.1 TaT (their public settings start the student from ImageNet weights; pretrain.py does not).
    Our convolutions start as CSF's do, sqrt(3) times as large as theirs.
    """

    needs_head = False

    def __init__(self, student_channels, teacher_channels, tat_axis="teacher", tat_weight=0.2):
        super().__init__()
        student, teacher = student_channels[-1], teacher_channels[-1]
        self.query, self.value = conv_bn(student, teacher, 3), conv_bn(student, teacher, 3)
        self.axis, self.weight = tat_axis, tat_weight

    def forward(self, student, teacher, images, labels):
        s = student.features[-1]
        with full_precision(s):
            s, t = matched(s, teacher.features[-1])
            q, v, t = (to_tokens(x) for x in (self.query(s), self.value(s), t))  # (B, h * w, C_t)
            return {"tat": self.weight * (rebuild(q, t, v, self.axis) - t).square().mean()}


METHODS = {"tat": TaT}
