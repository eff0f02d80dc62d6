"""
TransKD (Liu et al., "TransKD: Transformer Knowledge Distillation for Efficient Semantic
Segmentation", arXiv 2202.13393): what a student learns from a teacher in addition to the labels.

    feature maps       F_i^S --CSF--> Fhat_i        compared with F_i^T by HCL, four stages
    patch embeddings   E_i^S --PEA--> P_i           compared with E_i^T by MSE, four stages
                             (GL-Mixer before PEA at stage 4, or the Embedding Assistant beside PEA)

    L = CE(logits, labels) + sum_i HCL(Fhat_i, F_i^T) + sum_i alpha_i MSE(P_i, E_i^T)

c_i and C_i are the channels of stage i in student and teacher. The cross-entropy is computed by
the `Learner` of step.py, the two sums by a `Method`; every other method is one too. To learn
TransKD read `hcl`, `CrossSelectiveFusion`, `PatchEmbeddingAlignment` and `TransKD.forward`.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from files import UserError
from model import PATCHES, PatchEmbed, init_weights
from nets import by_products, full_precision, resize
from parallel import process_mean, rank_and_world

IGNORE = 255  # the label of pixels that no loss and no metric counts
# most full-size logits the cross-entropy holds at once; at least one image's. A CPU's cache holds
# few; a GPU needs many to be busy.
CHUNK = dict(cpu=2**22, cuda=2**26)

# ------------------------------------------------------------------------------------------------
# losses: computed in float32 under any autocast. The cross-entropy is a mean over labelled pixels;
# what compares student and teacher, over all positions, also those where a crop exceeds the photo


def valid_mean(values, valid):
    """Mean of `values` weighted by `valid` (>= 0); 0, not NaN, if nothing is valid."""
    return (values * valid).sum() / valid_count(valid)


def valid_count(valid):
    """The sum of `valid`, averaged over the processes (why: `process_mean`); 1 if that is 0."""
    count = process_mean(valid.sum(dtype=torch.float32))
    return torch.where(count > 0, count, torch.ones_like(count))


def paper_weights(pixels):
    """Pixels per class (K,) -> class weights (K,) of TransKD's release, 1 / ln(1.10 + share)."""
    return (1 / torch.log(1.10 + pixels / pixels.sum().clamp(min=1))).float()


def label_weights(labels, class_weights=None):
    """Each pixel's weight in the cross-entropy, (B, H, W) like the labels: 0 if it is IGNORE."""
    weights = (labels != IGNORE).float()
    if class_weights is not None:  # IGNORE, beyond their end, takes any of them: times 0
        weights = weights * class_weights[labels.long().clamp(max=len(class_weights) - 1)]
    return weights


def cross_entropy(logits, labels, class_weights=None, count=None):
    """CE of logits (B, K, h, w), resized to the labels (B, H, W), over labels other than IGNORE.

    With class_weights (K,) it is the weighted mean, sum(w_y * ce) / sum(w_y), as in torch. count:
    a divisor to use in place of sum(w_y).
    """
    weights = label_weights(labels, class_weights)
    total = ResizedCrossEntropy.apply(logits.float(), labels, weights)
    return total / (valid_count(weights) if count is None else count)


class ResizedCrossEntropy(torch.autograd.Function):
    """The following, a few images at a time and in less memory:

        ce = F.cross_entropy(resize(logits, size), labels, reduction="none", ignore_index=IGNORE)
        (weights * ce).sum()

    Logits as large as the labels are the largest tensors of a step: 19 classes take 637 MB for 16
    images of 512x1024, and autograd keeps several. Here the gradient, softmax - one_hot, is
    computed along with the loss and brought back to the size of the logits; nothing else is kept.
    The classes of a pixel are adjacent in memory: fastest for softmax, resize and its adjoint.
    """

    @staticmethod
    def forward(ctx, logits, labels, weights):
        total, grads = 0, []
        most = CHUNK[logits.device.type]
        chunk = max(1, most // (logits.shape[1] * labels[0].numel()))  # images at a time
        logits = logits.contiguous(memory_format=torch.channels_last)
        for x, y, w in zip(logits.split(chunk), labels.split(chunk), weights.split(chunk)):
            up = resize(x, y.shape[1:]).permute(0, 2, 3, 1)  # (chunk, H, W, K)
            log_p = up.log_softmax(dim=3)
            y = y.long().masked_fill(y == IGNORE, 0)[..., None]
            total = total - (log_p.gather(3, y)[..., 0] * w).sum()
            if ctx.needs_input_grad[0]:
                d = log_p.exp_().scatter_add_(3, y, torch.full_like(log_p[..., :1], -1.0))
                d = d.mul_(w[..., None]).permute(0, 3, 1, 2)  # (chunk, K, H, W)
                grads.append(resize_adjoint(d, x.shape))
        ctx.save_for_backward(torch.cat(grads) if grads else None)
        return total

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None, None


def resize_adjoint(x, shape):
    """The transpose of `resize` from `shape`: takes x, a gradient at its output, to its input."""
    if x.shape == shape:
        return x
    return torch.ops.aten.upsample_bilinear2d_backward(x, x.shape[2:], shape, False, None, None)


def hcl(student, teacher):
    """Hierarchical context loss of two maps (B, C, H, W) (Chen et al., "Knowledge Review").

    MSE at full size and after pooling to 4x4, 2x2 and 1x1, with weights 1, 1/2, 1/4, 1/8, divided
    by their sum. Levels not smaller than the map's height are skipped, without halving the weight.
    """
    d = student.float() - teacher.float()  # pooling is linear: pool the difference once
    loss, weight, total = d.square().mean(), 1.0, 1.0
    for level in (4, 2, 1):
        if level < d.shape[2]:
            weight /= 2
            total += weight
            loss = loss + weight * pooled(d, level).square().mean()
    return loss / total


def pooled(x, n):
    """F.adaptive_avg_pool2d(x, n) of a map (B, C, H, W), see `by_products`."""
    with full_precision(x):
        return by_products(x, F.adaptive_avg_pool1d, (n, n))  # (B, C, n, n)


def kl(student, teacher, dim, T=1.0):
    """KL(softmax(teacher / T) || softmax(student / T)) over `dim`, which the result lacks."""
    log_s, log_t = (F.log_softmax(z.float() / T, dim=dim) for z in (student, teacher))
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim)


def cwd(student, teacher, T=1.0):
    """Channel-wise distillation of two maps (B, C, H, W) (Shu et al., ICCV 2021).

    T^2 * KL(teacher || student) of the softmax over positions, averaged over B and C.
    """
    return T**2 * kl(student.flatten(2), teacher.flatten(2), 2, T).mean()


def kl_over_channels(student, teacher):
    """KL(teacher || student) of the softmax over channels, averaged over B and positions."""
    return kl(student, teacher, dim=1).mean()


def to_grid(x, size):
    """Map (B, C, H, W) at `size`: average-pooled where it is larger, bilinear where smaller."""
    return resize(F.adaptive_avg_pool2d(x, [min(a, b) for a, b in zip(x.shape[2:], size)]), size)


def matched(s, t):
    """Maps (B, C_s, h, w), (B, C_t, H, W) in float32, the teacher's at the student's size.

    Their matrix products are bfloat16 again under autocast, but for `full_precision`.
    """
    return s.float(), to_grid(t.float(), s.shape[2:])


FEATURE_LOSSES = {"hcl": hcl, "cwd": cwd, "kl": kl_over_channels, "none": None}
ALPHA = (0.1, 0.1, 0.5, 1.0)  # weights of the four stages' embeddings, as released
EMBED_STAGES = {"all": (0, 1, 2, 3), "none": (), "1": (0,), "2": (1,), "3": (2,), "4": (3,)}

# ------------------------------------------------------------------------------------------------
# CSF: feature maps of the four stages, fused from deep to shallow


def conv_bn(c_in, c_out, kernel):
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)  # as released: sqrt(3) times torch's default
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


def deep_to_shallow(features, reduce, fuse, expand):
    """Maps (B, c_i, H_i, W_i) -> (B, C_i, H_i, W_i), each fused with the result of the deeper ones.

    m_4 = reduce_4(F_4);  m_i = fuse_i(reduce_i(F_i), upsample(m_{i+1}));  expand_i(m_i)
    """
    maps, m = [], None
    for i in reversed(range(len(features))):
        x = reduce[i](features[i])  # (B, 64, H_i, W_i)
        m = x if m is None else fuse(i, x, F.interpolate(m, size=x.shape[2:], mode="nearest"))
        maps.insert(0, expand[i](m))
    return maps


def plain_squeeze(mid, squeeze):
    return nn.Sequential(nn.Conv2d(mid, squeeze, 1, bias=False), nn.ReLU())


class CrossSelectiveFusion(nn.Module):
    """CSF, of TransKD. Student maps (B, c_i, H_i, W_i) -> (B, C_i, H_i, W_i).

        x_i = BN(Conv1x1(F_i))                               64 channels
        m_4 = x_4;  r = upsample(m_{i+1})                    nearest, for i = 3, 2, 1
        z = squeeze(GAP(x_i + r))                            32 channels, GAP: mean over positions
        a_x, a_r = softmax over the two branches, per channel, of (W_x z, W_r z)
        m_i = a_x * x_i + a_r * r
        Fhat_i = BN(Conv3x3(m_i))                            the teacher's channels

    squeeze = ReLU(Conv1x1), or with norm="batch" a `ReleasedSqueeze`. As each x_i comes from a
    batch norm, GAP tells how an image differs from its batch: nothing where it is the only one.
    """

    def __init__(self, student_channels, teacher_channels, norm="none", mid=64, squeeze=32):
        super().__init__()
        self.reduce = nn.ModuleList(conv_bn(c, mid, 1) for c in student_channels)
        self.expand = nn.ModuleList(conv_bn(mid, c, 3) for c in teacher_channels)
        self.squeeze, self.attend_x, self.attend_r = (nn.ModuleList() for _ in range(3))
        for _ in student_channels[:-1]:  # the last stage has nothing deeper to fuse with
            make = ReleasedSqueeze if norm == "batch" else plain_squeeze
            self.squeeze.append(make(mid, squeeze))
            self.attend_x.append(nn.Conv2d(squeeze, mid, 1))
            self.attend_r.append(nn.Conv2d(squeeze, mid, 1))

    def fuse(self, i, x, r):
        z = self.squeeze[i]((x + r).mean(dim=(2, 3), keepdim=True))  # (B, 32, 1, 1)
        a = torch.stack([self.attend_x[i](z), self.attend_r[i](z)]).softmax(dim=0)
        # a: (2, B, 64, 1, 1)
        return a[0] * x + a[1] * r  # (B, 64, H_i, W_i)

    def forward(self, features):
        return deep_to_shallow(features, self.reduce, self.fuse, self.expand)


class ReleasedSqueeze(nn.Module):
    """CSF's squeeze as the authors released it: ReLU(BN(Conv1x1)), and at batch 1, where a batch
    norm of a 1x1 map has nothing to normalise, a second, separate ReLU(Conv1x1).

    At batch 2 that BN maps any two numbers that are not nearly equal to about 1 and -1: which image
    has the larger is all that the attention still knows of them.
    """

    def __init__(self, mid, squeeze):
        super().__init__()
        self.many, self.single = plain_squeeze(mid, squeeze), plain_squeeze(mid, squeeze)
        self.many.insert(1, nn.BatchNorm2d(squeeze))

    def forward(self, g):
        used, unused = self.many, self.single
        if len(g) * rank_and_world()[1] == 1:  # one image over all processes
            used, unused = unused, used
        return used(g + sum(0 * p.sum() for p in unused.parameters()))  # DDP wants all gradients


# ------------------------------------------------------------------------------------------------
# PEA: patch embeddings of the four stages; GL-Mixer and Embedding Assistant


class GLMixer(nn.Module):
    """Global-Local context Mixer, of TransKD-GL: tokens (B, N, C) -> (B, N, C).

        E' = w_global * MHSA(E) + w_local * (conv(E) * sigmoid(gate(E)))     residual: + E

    8 heads; conv and gate: two Conv1d, 3 tokens wide. Both weights are learned and start at `init`:
    at 0.5, E' is the mean of the two. (The authors' code leaves them uninitialised, so the values
    its results started from are unknown.)
    """

    def __init__(self, dim, heads=8, init=0.5, residual=False):
        super().__init__()
        if dim % heads:
            raise UserError(f"GL-Mixer: {dim} channels do not divide into {heads} heads")
        self.heads, self.residual = heads, residual
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.conv = nn.Conv1d(dim, dim, 3, padding=1)
        self.gate = nn.Conv1d(dim, dim, 3, padding=1)
        self.w_global = nn.Parameter(torch.tensor([float(init)]))
        self.w_local = nn.Parameter(torch.tensor([float(init)]))

    def forward(self, x):
        # (B, N, 3, heads, d) -> 3 x (B, heads, N, d), d = C / heads
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        y = self.proj(y.transpose(1, 2).flatten(2))  # (B, N, C)
        t = x.transpose(1, 2)  # (B, C, N): neighbours in raster order
        local = (self.conv(t) * self.gate(t).sigmoid()).transpose(1, 2)  # (B, N, C)
        y = self.w_global * y + self.w_local * local
        return y + x if self.residual else y


class PatchEmbeddingAlignment(nn.Module):
    """PEA, of TransKD: student embeddings (B, N_i, c_i) -> (B, N_i, C_i), by a Linear.

    variant="gl": at stage 4 the GL-Mixer comes first.
    variant="ea": the Embedding Assistant, a second patch embedding with the teacher's channels,
    has the same input as the student's own (the image, then the map of the stage before):
        P_i = u_i * Linear_i(E_i) + v_i * EA_i(input_i),  initially u = .1 .2 .3 .4, v = .5 .6 .7 .8
    """

    def __init__(self, student_channels, teacher_channels, stages, variant, gl_init, gl_residual):
        super().__init__()
        self.stages, self.variant = stages, variant
        pairs = [(student_channels[i], teacher_channels[i]) for i in stages]
        self.linears = nn.ModuleList(nn.Linear(c, C) for c, C in pairs)
        if variant == "gl" and 3 in stages:
            self.mixer = GLMixer(student_channels[3], init=gl_init, residual=gl_residual)
        if variant == "ea":
            inputs = (3, *student_channels[:3])
            self.assistants = nn.ModuleList(
                PatchEmbed(inputs[i], teacher_channels[i], *PATCHES[i]) for i in stages
            )
            self.assistants.apply(init_weights)
            self.u = nn.ParameterList(torch.tensor([0.1 * (i + 1)]) for i in stages)
            self.v = nn.ParameterList(torch.tensor([0.1 * (i + 5)]) for i in stages)

    def forward(self, student, images):
        aligned = []
        for k, i in enumerate(self.stages):
            e = student.embeddings[i]  # (B, N_i, c_i)
            if self.variant == "gl" and i == 3:
                e = self.mixer(e)
            p = self.linears[k](e)  # (B, N_i, C_i)
            if self.variant == "ea":
                source = images if i == 0 else student.features[i - 1]
                p = self.u[k] * p + self.v[k] * self.assistants[k](source)[0]
            aligned.append(p)
        return aligned


# ------------------------------------------------------------------------------------------------
# the methods


class Method(nn.Module):
    """What a student learns from its teacher.

    Built from the channels of the four stages of student and teacher; called with two
    `nets.Output`s, the images (B, 3, H, W) and labels (B, H, W) uint8, which are smaller with
    --label-stride. Returns a dict of named, weighted scalar tensors for the loop to sum and log:
    the same names in every step, none of them "ce". Its parameters, the adapters, train with the
    student's and are then discarded: the deployed student has none of them. --resume restores its
    buffers too.
    """

    needs_teacher = True  # or the teacher is not run at all
    needs_head = True  # or the teacher's head is not: its logits and decoded map are None
    replaces_ce = False  # whether the cross-entropy with the labels is left out
    note = ""  # a line to print


class NoDistillation(Method):
    """The student alone: no terms, no parameters, no teacher."""

    needs_teacher = needs_head = False

    def __init__(self, student_channels, teacher_channels):
        super().__init__()

    def forward(self, student, teacher, images, labels):
        return {}


class TransKD(Method):
    """TransKD-Base, -GL or -EA (variant "base", "gl", "ea"): CSF with HCL, plus PEA with MSE.

    feature_loss: "hcl" or, in its place, "cwd" or "kl"; "none" leaves CSF out (PEA alone).
    embed: "all" stages with weights ALPHA, one stage "1".."4" with weight 1, "none" (CSF alone).
    feature_weight, embed_weight: factors on the two sums; 1 as released; 0 leaves a part out.

    A CNN's maps are brought to the student's grids (`to_grid`); it has no patch embeddings
    (has_embeddings), so only CSF can learn from it.
    """

    needs_head = False

    def __init__(
        self,
        student_channels,
        teacher_channels,
        variant="base",
        csf_norm="none",
        feature_loss="hcl",
        embed="all",
        feature_weight=1.0,
        embed_weight=1.0,
        gl_init=0.5,
        gl_residual=False,
        has_embeddings=True,
    ):
        super().__init__()
        self.feature_loss = FEATURE_LOSSES[feature_loss] if feature_weight else None
        self.feature_weight, self.embed_weight = feature_weight, embed_weight
        stages = EMBED_STAGES[embed] if embed_weight else ()
        self.alpha = ALPHA if embed == "all" else (1.0,)
        self.csf = self.pea = None
        if self.feature_loss:
            self.csf = CrossSelectiveFusion(student_channels, teacher_channels, csf_norm)
        if stages:
            self.pea = PatchEmbeddingAlignment(
                student_channels, teacher_channels, stages, variant, gl_init, gl_residual
            )
        mixes = gl_init != 0.5 or gl_residual
        self.refuse_idle(variant, csf_norm, feature_loss, embed, stages, mixes)
        if stages and not has_embeddings:
            raise UserError(
                f"transkd-{variant}: a CNN teacher has no patch embeddings to align with; "
                "--method transkd-base --embed none distils its feature maps alone"
            )

    def refuse_idle(self, variant, csf_norm, feature_loss, embed, stages, mixes):
        """UserError for an option that acts on a part which is left out."""
        no_maps, no_tokens = not self.feature_loss, not stages
        for idle, what in (
            (no_maps and no_tokens, "feature maps and embeddings both left out"),
            (no_maps and csf_norm != "none", "--csf-norm"),
            (feature_loss == "none" and self.feature_weight != 1, "--feature-weight"),
            (self.feature_weight == 0 and feature_loss not in ("hcl", "none"), "--feature-loss"),
            (embed == "none" and self.embed_weight != 1, "--embed-weight"),
            (self.embed_weight == 0 and embed not in ("all", "none"), "--embed"),
            (variant != "gl" and mixes, "--gl-init or --gl-residual"),
            (variant == "gl" and 3 not in stages, "no embeddings of stage 4, and their mixer"),
            (variant == "ea" and no_tokens, "no embeddings, and their Embedding Assistant"),
        ):
            if idle:
                raise UserError(f"transkd-{variant}, {what}: there is nothing for it to act on")

    def forward(self, student, teacher, images, labels):
        terms = {}
        if self.csf is not None:
            maps = self.csf(student.features)  # 4 x (B, C_i, H_i, W_i)
            terms["features"] = self.feature_weight * sum(
                self.feature_loss(*matched(f, t)) for f, t in zip(maps, teacher.features)
            )
        if self.pea is not None:
            aligned = self.pea(student, images)  # (B, N_i, C_i) per stage
            targets = [teacher.embeddings[i] for i in self.pea.stages]
            terms["embeddings"] = self.embed_weight * sum(
                a * F.mse_loss(p.float(), t.float())
                for a, p, t in zip(self.alpha, aligned, targets)
            )
        return terms


METHODS = {
    "none": NoDistillation,
    "transkd-base": functools.partial(TransKD, variant="base"),
    "transkd-gl": functools.partial(TransKD, variant="gl"),
    "transkd-ea": functools.partial(TransKD, variant="ea"),
}
