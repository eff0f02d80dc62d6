"""
Distillation methods of other papers, behind the interface of distill.py: nn.Modules built from the
channels of student and teacher, called as `method(student, teacher, images, labels)`.

All but review are as in the comparison of Yang et al. (CIRKD, CVPR 2022) and use what its scripts
use: the logits and the decoded map after its ReLU, unlabelled pixels included unless stated
otherwise. Weights are those of its scripts for SegFormers, or for CNNs if there are no others
(fitnet, at). To each but dsd the scripts add kd with weight 1: `--method skd+kd`. The adversarial
parts of skd, ifvd and cwd, of weight 0.001 there, are left out. Where the teacher's map differs in
size from the student's, the teacher's is resized.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import c2vkd
import manifold
import tat
from distill import Method, conv_bn, cwd, deep_to_shallow, hcl, kl, matched, valid_mean
from manifold import gram_difference
from model import to_tokens
from nets import draws, full_precision
from parallel import gather, rank_and_world

# ------------------------------------------------------------------------------------------------
# shared by several methods


def decoded_maps(student, teacher):
    """The matched decoded maps after their ReLU, (B, Cs, h, w) and (B, Ct, h, w)."""
    return matched(F.relu(student.decoded), F.relu(teacher.decoded))


def attention(x):
    """A map (B, C, h, w)'s strength: the mean of its squares over C, as unit vectors (B, h*w)."""
    return F.normalize(x.square().mean(dim=1).flatten(1))


def class_masks(labels, size, classes):
    """A mask per class: labels (B, H, W), nearest neighbour at `size` -> bool (B, K, h*w)."""
    near = F.interpolate(labels[:, None].float(), size=size, mode="nearest").flatten(2)
    return near == torch.arange(classes, device=labels.device)[:, None]  # IGNORE is in no mask


# ------------------------------------------------------------------------------------------------
# maps compared position by position


class PixelKD(Method):
    """Soft-label distillation of every pixel (Hinton et al., arXiv 1503.02531, for dense outputs).

    T^2 * KL(softmax(teacher / T) || softmax(student / T)) over the classes, averaged over the
    pixels of the stride-4 logits, or, of classifiers' logits (B, K), over the images. Labels
    are not used, so pixels without one count too.
    """

    def __init__(self, student_channels, teacher_channels, kd_weight=1.0, temperature=1.0):
        super().__init__()
        self.weight, self.T = kd_weight, temperature

    def forward(self, student, teacher, images, labels):
        s, t = student.logits, teacher.logits
        if s.ndim == 4:
            s, t = matched(s, t)
        return {"kd": self.weight * self.T**2 * kl(s, t, 1, self.T).mean()}


class FitNet(Method):
    """FitNets (Romero et al., arXiv 1412.6550, eq. 3): the student's map, projected.

    mean (Conv1x1(s) - t)^2 of the decoded maps, or of the maps of stage fitnet_layer = "1" .. "4".
    The paper trains up to that layer first; here, as in CIRKD's scripts, all is trained at once.
    """

    def __init__(
        self, student_channels, teacher_channels, widths, fitnet_weight=10.0, fitnet_layer="decoded"
    ):
        super().__init__()
        self.needs_head = fitnet_layer == "decoded"
        self.weight = fitnet_weight
        if not self.needs_head:
            self.stage = int(fitnet_layer) - 1
            widths = student_channels[self.stage], teacher_channels[self.stage]
        self.project = nn.Conv2d(*widths, 1, bias=False)

    def forward(self, student, teacher, images, labels):
        if self.needs_head:
            s, t = decoded_maps(student, teacher)
        else:
            s, t = matched(*(out.features[self.stage] for out in (student, teacher)))
        return {"fitnet": self.weight * F.mse_loss(self.project(s).float(), t)}


class AttentionTransfer(Method):
    """AT (Zagoruyko & Komodakis, arXiv 1612.03928, eq. 2): mean (a_s - a_t)^2 of `attention`.

    The weight is 1e4 because of the mean over h*w positions, where the paper has a norm.
    """

    def __init__(self, student_channels, teacher_channels, at_weight=1e4):
        super().__init__()
        self.weight = at_weight

    def forward(self, student, teacher, images, labels):
        s, t = (attention(x) for x in decoded_maps(student, teacher))
        return {"at": self.weight * F.mse_loss(s, t)}


class ChannelWise(Method):
    """CWD (Shu et al., arXiv 2011.13256): `distill.cwd` of the decoded maps and of the logits.

    Where the widths differ, a 1x1 conv brings the student's decoded map to the teacher's channels.
    The mean is over these; the published code divides by the student's, which makes the feature
    term C_t / C_s times as large: for B2 -> B0 that is `--cwd-feature-weight 15`. A weight of 0
    leaves its part out. (CIRKD reports B0 taught this way by B4 as worse than B0 alone.)
    """

    def __init__(
        self,
        student_channels,
        teacher_channels,
        widths,
        cwd_feature_weight=5.0,
        cwd_logit_weight=0.3,
        cwd_temperature=4.0,
    ):
        super().__init__()
        self.weights, self.T = (cwd_feature_weight, cwd_logit_weight), cwd_temperature
        self.project = nn.Identity()
        if cwd_feature_weight and widths[0] != widths[1]:
            self.project = nn.Conv2d(*widths, 1, bias=False)

    def forward(self, student, teacher, images, labels):
        features, logits = self.weights
        terms = {}
        if features:
            s, t = decoded_maps(student, teacher)
            terms["features"] = features * cwd(self.project(s), t, self.T)
        if logits:
            terms["logits"] = logits * cwd(*matched(student.logits, teacher.logits), self.T)
        return terms


class KnowledgeReview(Method):
    """KR (Chen et al., arXiv 2104.09044): the four stages, fused from deep to shallow; HCL.

        x_i = BN(Conv1x1(F_i));  m_4 = x_4;  r = upsample(m_{i+1})    64 channels, nearest
        a_x, a_r = sigmoid(Conv1x1([x_i, r]))                         one map each
        m_i = a_x * x_i + a_r * r                                     (ABF)
        term = sum_i hcl(BN(Conv3x3(m_i)), F_i^T)

    TransKD's CSF is this with attention over channels, not positions, and a softmax. Four stages
    and 64 channels are what TransKD's release compares with; the authors' image classifiers have a
    fifth level, 1x1, and 256 or 512 channels.
    """

    needs_head = False

    def __init__(self, student_channels, teacher_channels, review_weight=1.0):
        super().__init__()
        self.weight, mid = review_weight, 64
        self.reduce = nn.ModuleList(conv_bn(c, mid, 1) for c in student_channels)
        self.expand = nn.ModuleList(conv_bn(mid, c, 3) for c in teacher_channels)
        self.attend = nn.ModuleList(nn.Conv2d(2 * mid, 2, 1) for _ in student_channels[:-1])

    def fuse(self, i, x, r):
        a = self.attend[i](torch.cat([x, r], dim=1)).sigmoid()  # (B, 2, H_i, W_i)
        return a[:, :1] * x + a[:, 1:] * r

    def forward(self, student, teacher, images, labels):
        maps = deep_to_shallow(student.features, self.reduce, self.fuse, self.expand)
        pairs = zip(maps, teacher.features)
        return {"review": self.weight * sum(hcl(*matched(s, t)) for s, t in pairs)}


# ------------------------------------------------------------------------------------------------
# relations between positions, or between channels


class StructuredKD(Method):
    """SKD (Liu et al., arXiv 1903.04197), its pair-wise term: the similarity of any two positions.

    The decoded maps are max-pooled 2x2; mean (cos(s_i, s_j) - cos(t_i, t_j))^2 over all pairs i, j
    of an image. Its pixel-wise term is kd; the adversarial ("holistic") one is left out.
    """

    def __init__(self, student_channels, teacher_channels, skd_weight=10.0):
        super().__init__()
        self.weight = skd_weight

    def forward(self, student, teacher, images, labels):
        pooled = (F.max_pool2d(x, 2, ceil_mode=True) for x in decoded_maps(student, teacher))
        s, t = (F.normalize(to_tokens(x), dim=2) for x in pooled)  # (B, n, C)
        return {"skd": self.weight * gram_difference(s, t).mean()}


class IntraClassVariation(Method):
    """IFVD (Wang et al., ECCV 2020): how far each pixel is from the mean of its class in its image.

    v = cos(f, mean f of the class); mean (v_s - v_t)^2 over the pixels with a label, labels taken
    by nearest neighbour at the map's size. (The published code counts those without as 0.)
    """

    def __init__(self, student_channels, teacher_channels, ifvd_weight=20.0):
        super().__init__()
        self.weight = ifvd_weight

    def variation(self, x, masks):
        """Map (B, C, h, w) and masks (B, K, h*w) -> cosines (B, h*w)."""
        x = to_tokens(x)  # (B, h*w, C)
        with full_precision(x):
            sums = masks.float() @ x  # (B, K, C); equivalent to means in a cosine
            own = masks.mT.float() @ sums  # (B, h*w, C): that of the pixel's class
        return F.cosine_similarity(x, own, dim=2)

    def forward(self, student, teacher, images, labels):
        s, t = decoded_maps(student, teacher)
        masks = class_masks(labels, s.shape[2:], student.logits.shape[1])
        difference = self.variation(s, masks) - self.variation(t, masks)
        return {"ifvd": self.weight * valid_mean(difference.square(), masks.any(dim=1))}


class DoubleSimilarity(Method):
    """DSD (Feng et al., IEEE TIP 2021): pixel-wise (PSD) and category-wise (CSD) similarity.

        PSD: mean (r_s - r_t)^2, r = normalize(attention(logits) - attention(decoded)) over h*w
        CSD: mean (P_s P_s^T - P_t P_t^T)^2 over K x K, P = softmax over positions of logits / 4,
             first averaged over 2x2 positions

    Rows of P sum to 1 over thousands of positions: CSD is tiny, about 1e-9 on random logits, and
    has hardly any effect at its published weight. A weight of 0 leaves its part out.
    """

    def __init__(
        self, student_channels, teacher_channels, dsd_psd_weight=1000.0, dsd_csd_weight=10.0
    ):
        super().__init__()
        self.weights = (dsd_psd_weight, dsd_csd_weight)

    def forward(self, student, teacher, images, labels):
        psd, csd = self.weights
        terms, logits = {}, matched(student.logits, teacher.logits)
        if psd:
            both = zip(logits, decoded_maps(student, teacher))
            s, t = (F.normalize(attention(z) - attention(f)) for z, f in both)  # (B, h*w)
            terms["psd"] = psd * F.mse_loss(s, t)
        if csd:
            pooled = (F.avg_pool2d(z, 2, ceil_mode=True).flatten(2) for z in logits)
            s, t = ((z / 4).softmax(dim=2) for z in pooled)  # (B, K, n)
            terms["csd"] = csd * gram_difference(s, t).mean()
        return terms


# ------------------------------------------------------------------------------------------------
# relations across images

PIXELS = 16  # per class and image, for CIRKD's queue


def similarity_kl(s, t, s_keys, t_keys):
    """KL(teacher || student) of softmax(row . keys / 0.1): s (n, C), keys (m, C) -> (n,).

    The backward pass recomputes the (n, m) matrices, so that none is kept until then.
    """

    def compare(s, t, s_keys, t_keys):
        with full_precision(s):
            return kl(s @ s_keys.mT, t @ t_keys.mT, 1, 0.1)  # of (n, m) each

    args = (s, t, s_keys, t_keys)
    return checkpoint(compare, *args, use_reentrant=False, preserve_rng_state=False)


def push(queue, at, rows, filled):
    """Add rows (K, m, C) to the ring buffers (K, size, C) at `at` (K,).

    Only rows that are `filled` (K, m), which come first, are added.
    """
    k = torch.arange(len(queue), device=queue.device)[:, None]
    places = (at[:, None] + torch.arange(rows.shape[1], device=queue.device)) % queue.shape[1]
    queue[k, places] = torch.where(filled[:, :, None], rows, queue[k, places])
    at.copy_((at + filled.sum(dim=1)) % queue.shape[1])


class CIRKD(Method):
    """CIRKD (Yang et al., arXiv 2204.06986): a pixel's similarities, within and across images.

    Each term is a mean over pixels of KL(teacher || student) of softmax(cosines / 0.1):

        batch    to the pixels of every image of the batch, each net's to its own
        pixels   to pixels of this and earlier images
        regions  to the means of a class in one of these images

    The last two use pixels with a label, and compare both nets with the teacher's features: the
    student's map goes through conv-BN-ReLU-conv to its channels. Each class has a queue of pixels
    and one of regions, random at first (245 MB for 20 classes of a B2, saved with a run). Before it
    is compared, an image adds 16 random pixels of each class, and the mean of all the class's
    pixels; about cirkd_*_contrast / K random entries of each queue serve as keys. A weight of 0
    leaves its part out, and its queue.

    Fixed here: the published code mistakes an index into a class's pixels for one into the image,
    so its pixel queues hold other classes. cirkd_pool: batch first averages 2x2 pixels, as when
    CIRKD's SegFormer table was made; other versions take 4 (the newest only on large maps). batch
    pairs each image with itself too, and with those of all processes; the published code gathers
    none, and its SegFormers had one image a process. The terms that its version 2 added are not
    here.
    """

    def __init__(
        self,
        student_channels,
        teacher_channels,
        widths,
        classes,
        cirkd_batch_weight=1.0,
        cirkd_pixel_weight=0.1,
        cirkd_region_weight=0.1,
        cirkd_pool=2,
        cirkd_pixel_queue=2000,
        cirkd_region_queue=2000,
        cirkd_pixel_contrast=4096,
        cirkd_region_contrast=1024,
    ):
        super().__init__()
        batch, pixels, regions = cirkd_batch_weight, cirkd_pixel_weight, cirkd_region_weight
        queue = dict(pixels=cirkd_pixel_queue, regions=cirkd_region_queue)
        contrast = dict(pixels=cirkd_pixel_contrast, regions=cirkd_region_contrast)
        self.weights = dict(batch=batch, pixels=pixels, regions=regions)
        self.pool, self.classes, self.contrast = cirkd_pool, classes, contrast
        self.memories = [name for name in queue if self.weights[name]]
        for name in self.memories:
            rows = F.normalize(torch.randn(classes, queue[name], widths[1]), dim=2)
            self.register_buffer(name, rows)  # (K, size, C)
            self.register_buffer(f"{name}_at", torch.zeros(classes, dtype=torch.long))
        if self.memories:
            c = widths[1]
            first, last = (nn.Conv2d(c_in, c, 1, bias=False) for c_in in (widths[0], c))
            self.project = nn.Sequential(first, nn.BatchNorm2d(c), nn.ReLU(), last)

    def batch_term(self, s, t):
        maps = (F.avg_pool2d(x, self.pool, ceil_mode=True) for x in (s, t))
        s, t = (F.normalize(to_tokens(x), dim=2) for x in maps)  # (B, n, C)
        others = [*zip(gather(s), gather(t))]
        terms = [similarity_kl(*own, *other).mean() for own in zip(s, t) for other in others]
        return self.weights["batch"] * sum(terms) / len(terms)

    @torch.no_grad()
    def remember(self, t, masks):
        """Put images into the queues: the teacher's unit rows (B, n, C), their masks (B, K, n)."""
        B, n = t.shape[:2]
        new = {}  # name: rows (B, K, m, C), and which of them count (B, K, m)
        if "pixels" in self.memories:
            draw = draws((B, 1, n), rank_and_world(), t.device)
            m = min(PIXELS, n, self.pixels.shape[1])
            best = torch.where(masks, draw, -1.0).topk(m, dim=2)  # of the class, then others at -1
            rows = torch.stack([image[i] for image, i in zip(t, best.indices)])
            new["pixels"] = rows, best.values >= 0
        if "regions" in self.memories:
            with full_precision(t):
                sums = F.normalize(masks.float() @ t, dim=2)  # (B, K, C)
            new["regions"] = sums[:, :, None], masks.any(dim=2, keepdim=True)
        for name, (rows, filled) in new.items():
            for image in zip(gather(rows), gather(filled.float()) > 0):
                push(getattr(self, name), getattr(self, f"{name}_at"), *image)

    def memory_terms(self, s, t, labels):
        masks = class_masks(labels, s.shape[2:], self.classes)  # (B, K, n)
        s = F.normalize(to_tokens(self.project(s).float()), dim=2)  # (B, n, C)
        t = F.normalize(to_tokens(t), dim=2)
        if self.training:
            self.remember(t, masks)
        terms = {}
        for name in self.memories:
            queue = getattr(self, name)
            drawn = torch.randperm(queue.shape[1], device=queue.device)
            keys = queue[:, drawn[: self.contrast[name] // self.classes + 1]].flatten(0, 1)
            found = [similarity_kl(a, b, keys, keys) for a, b in zip(s, t)]  # B x (n,)
            terms[name] = self.weights[name] * valid_mean(torch.stack(found), masks.any(dim=1))
        return terms

    def forward(self, student, teacher, images, labels):
        s, t = decoded_maps(student, teacher)
        terms = self.memory_terms(s, t, labels) if self.memories else {}
        if self.weights["batch"]:
            terms["batch"] = self.batch_term(s, t)
        return terms


METHODS = tat.METHODS | manifold.METHODS | c2vkd.METHODS  # with files of their own
METHODS |= {
    "kd": PixelKD,
    "fitnet": FitNet,
    "at": AttentionTransfer,
    "cwd": ChannelWise,
    "review": KnowledgeReview,
    "skd": StructuredKD,
    "ifvd": IntraClassVariation,
    "dsd": DoubleSimilarity,
    "cirkd": CIRKD,
}
