"""
C2VKD, "CNN to ViT knowledge distillation" (Zheng et al., arXiv 2310.07265), as far as it is known:
a RECONSTRUCTION. The authors' public code calls all four terms and implements three. It lacks PDD
(written here from descriptions of the paper's equations 8 and 9), the attention pool of the
linguistic term and its weights, and cannot be run.

    L = PDD(logits, labels)                                              in place of cross-entropy
      + 0.1 * KL of the deepest maps over channels  + 0.1 * MSE of their Gram matrices       (VLFD)
      + 0.5 * KL of the maps' language embeddings, given CLIP's attention pool

Designed for ResNet teachers; all but the linguistic term works with any teacher.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import distill
import weights
from distill import IGNORE, Method, valid_mean
from files import UserError
from manifold import gram_difference
from model import to_map, to_tokens
from nets import full_precision, resize
from parallel import gather


def kl(student, teacher):
    """KL(softmax(teacher) || softmax(student)) over dim 1, divided by the number of ALL elements.

    As in the code; in the paper's equations student and teacher are reported to be swapped.
    """
    return distill.kl(student, teacher, dim=1).mean() / student.shape[1]


def graph(student, teacher):
    """Mean squared difference of Gram matrices: maps (B, C, H, W), all positions of all images.

    Rows, one per position, are scaled to length 1 and then centred over channels; their products
    are divided by C - 1. So a product is 1 / (C - 1) at most, and the value (2 / (C - 1))^2: at
    C = 2048 less than 1e-6. As published, this term has practically no effect.
    """
    rows = []
    for x in (gather(student), gather(teacher)):
        r = F.normalize(x.float().movedim(1, 3).flatten(0, 2), dim=1)  # (B*H*W, C)
        rows.append((r - r.mean(dim=1, keepdim=True)) / (r.shape[1] - 1) ** 0.5)
    return gram_difference(*rows)


def label_and_rest(logits, labels):
    """Log-probabilities of the label y, of all else, (B, H, W) each, and within all else.

    labels: (B, H, W) int64. The third, (B, K, H, W), is the log-softmax over the classes except y,
    whose own entry is practically minus infinity.
    """
    log_p = logits.log_softmax(dim=1)
    others = log_p.scatter(1, labels[:, None], -1e4)
    log_n = others.logsumexp(dim=1, keepdim=True)  # exact where log(1 - p_y) is not
    return log_p.gather(1, labels[:, None])[:, 0], log_n[:, 0], others - log_n


def pdd(student, teacher, labels, reading="binary", target=0.5, rest=0.5):
    """Pixel-wise decoupled distillation of logits (B, K, h, w), resized to labels (B, H, W).

    s = (s_y, s_n) and t = (t_y, t_n): the student's and the teacher's probabilities of the label
    and of all else. Mean over labelled pixels of, by `reading`,

    "binary": target * s_y log(s_y / q_y) + rest * s_n log(s_n / q_n), with q = (t + (1, 0)) / 2,
              halfway from the teacher to the label. A reverse KL: with equal weights it is 0 at
              s = q, not at s = t. It has hardly any gradient where the student is confidently
              wrong, and ignores which wrong class the teacher prefers.
    "dkd":    target * KL(t || s) + rest * KL(teacher || student) among the other classes, that is
              decoupled distillation (Zhao et al., CVPR 2022). Only the teacher is fitted: labels
              only define the two parts.
    """
    labels = labels.long()
    valid = labels != IGNORE
    safe = labels.where(valid, 0)
    s, t = (resize(z.float(), labels.shape[1:]) for z in (student, teacher))
    # from here on all names are logarithms of the docstring's probabilities
    (s_y, s_n, s_others), (t_y, t_n, t_others) = label_and_rest(s, safe), label_and_rest(t, safe)
    if reading == "binary":
        q_y, q_n = F.softplus(t_y) - math.log(2), t_n - math.log(2)  # log((t_y + 1) / 2), ...
        loss = target * s_y.exp() * (s_y - q_y) + rest * s_n.exp() * (s_n - q_n)
    else:
        among = (t_others.exp() * (t_others - s_others)).sum(dim=1)  # (B, H, W)
        loss = target * (t_y.exp() * (t_y - s_y) + t_n.exp() * (t_n - s_n)) + rest * among
    return valid_mean(loss, valid.float())


class AttentionPool(nn.Module):
    """CLIP's attention pool (Radford et al., arXiv 2103.00020), frozen: (B, C, H, W) -> (B, D).

    Attention with one query, the mean over positions, on that mean and all positions. The
    positional embedding is resized to H x W. The weights are buffers, as none of them is trained.

    source: a file with the tensors `visual.attnpool.*` of a CLIP with a ResNet, as torch.save
    writes them (or any state dict that has them).
    """

    def __init__(self, source, channels):
        super().__init__()
        if not Path(source).is_file():
            raise UserError(f"--c2vkd-clip {source}: no such file")
        tensors, _ = weights.unwrap(weights.load_any(source), source)
        pool = {k.split("attnpool.")[1]: v.float() for k, v in tensors.items() if "attnpool." in k}
        C, D = channels, len(pool.get("c_proj.weight", ()))
        side = math.isqrt(max(len(pool.get("positional_embedding", ())) - 1, 0))
        shapes = {"positional_embedding": (side**2 + 1, C)}
        shapes |= {f"{name}_proj.weight": (C, C) for name in "qkv"} | {"c_proj.weight": (D, C)}
        shapes |= {f"{name}_proj.bias": (C,) for name in "qkv"} | {"c_proj.bias": (D,)}
        for name, shape in shapes.items():
            if name not in pool or pool[name].shape != shape:
                raise UserError(
                    f"--c2vkd-clip {source}: visual.attnpool.{name} is missing or does not fit a "
                    f"teacher with {C} channels (CLIP's RN101 fits the ResNets)"
                )
            self.register_buffer(name.replace(".", "_"), pool[name], persistent=False)
        self.heads, self.side, self.width = C // 64, side, D

    def forward(self, x):
        x, size = to_tokens(x), x.shape[2:]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # (B, 1 + H*W, C)
        mean, grid = self.positional_embedding[:1], self.positional_embedding[1:]
        grid = resize(to_map(grid[None], self.side, self.side), size)  # (1, C, H, W)
        x = x + torch.cat([mean, to_tokens(grid)[0]])
        q = F.linear(x[:, :1], self.q_proj_weight, self.q_proj_bias)  # (B, 1, C)
        k = F.linear(x, self.k_proj_weight, self.k_proj_bias)  # (B, 1 + H*W, C)
        v = F.linear(x, self.v_proj_weight, self.v_proj_bias)
        # (B, n, C) -> (B, heads, n, C / heads), n = 1 for q, 1 + H*W for k and v
        q, k, v = (z.unflatten(2, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)  # (B, C)
        return F.linear(y, self.c_proj_weight, self.c_proj_bias)  # (B, D)


class C2VKD(Method):
    """PDD of the logits, VLFD of the deepest maps: the student's stage 4, the teacher's layer4.

    A 1x1 convolution without bias brings the student's to the teacher's channels; then both are
    resized (bilinear) to the student's stride-16 grid, that of the published teacher.

    c2vkd_pdd: "binary" or "dkd", the two readings of PDD (see `pdd`), with the weights
    c2vkd_alpha of the label's part and c2vkd_beta of the rest's.
    c2vkd_ce: add the cross-entropy. The published loop computes it but does not add it.
    c2vkd_global, c2vkd_graph: the weights of VLFD; at the published ones both terms are so small
    (see `kl` and `graph`) that they hardly have an effect.
    c2vkd_clip: a file with CLIP's attention pool, which turns the teacher's map into a language
    embedding that the student's mean vector is to predict by one linear layer, with the weight
    c2vkd_language. Without it that term is left out: no other pool can replace it. That it was
    RN101's is a guess from its dimensions.
    """

    def __init__(
        self,
        student_channels,
        teacher_channels,
        c2vkd_pdd="binary",
        c2vkd_alpha=0.5,
        c2vkd_beta=0.5,
        c2vkd_ce=False,
        c2vkd_global=0.1,
        c2vkd_graph=0.1,
        c2vkd_language=0.5,
        c2vkd_clip=None,
    ):
        super().__init__()
        if c2vkd_language != 0.5 and not c2vkd_clip:
            raise UserError(
                "c2vkd, --c2vkd-language: nothing for it to act on without --c2vkd-clip"
            )
        self.replaces_ce = not c2vkd_ce
        self.pdd = dict(reading=c2vkd_pdd, target=c2vkd_alpha, rest=c2vkd_beta)
        self.global_weight, self.graph_weight = c2vkd_global, c2vkd_graph
        self.language_weight = c2vkd_language
        c, C = student_channels[3], teacher_channels[3]
        self.project = nn.Conv2d(c, C, 1, bias=False)
        self.pool = self.describe = None
        if not c2vkd_clip:
            self.note = "c2vkd: without its linguistic term, which needs --c2vkd-clip"
        else:
            self.pool = AttentionPool(c2vkd_clip, C)
            self.describe = nn.Linear(c, self.pool.width)

    def forward(self, student, teacher, images, labels):
        grid = student.features[2].shape[2:]
        deep, target = student.features[3].float(), teacher.features[3].float()
        with full_precision(deep):
            s, t = resize(self.project(deep), grid), resize(target, grid)  # (B, C, H/16, W/16)
            terms = {"pdd": pdd(student.logits, teacher.logits, labels, **self.pdd)}
            terms["global"] = self.global_weight * kl(s, t)
            terms["graph"] = self.graph_weight * graph(s, t)
            if self.pool:
                predicted = self.describe(deep.mean(dim=(2, 3)))  # (B, D)
                terms["language"] = self.language_weight * kl(predicted, self.pool(t))
        return terms


METHODS = {"c2vkd": C2VKD}
