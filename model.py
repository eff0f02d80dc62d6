"""
MiT encoders and the SegFormer head, hand-written (Xie et al., NeurIPS 2021, arXiv 2105.15203).

    net = build("b0", num_classes=19)
    out = net(images)             # float images (B, 3, H, W), normalised, any H, W >= 32
    out.logits                    # (B, K, ceil(H/4), ceil(W/4))
    out.features                  # four maps (B, C_i, H_i, W_i), after the stage's LayerNorm
    out.embeddings                # four patch embeddings (B, H_i * W_i, C_i), after their LayerNorm
    out.decoded                   # (B, width, ceil(H/4), ceil(W/4)), normalised, before ReLU

Features and embeddings are what TransKD distils; `net(images, head=False)` skips the head. The
nets of others.py consist of the same blocks; they and the CNN teachers of cnn.py come from the same
`build` and `load`, and are called the same way.
"""

import hashlib
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

import cnn
import weights
from files import UserError, save_tensors, some
from nets import Drop, Output, full_precision, resize, resize_by_products
from weights import IMAGENET_MEAN, IMAGENET_STD

# name: (embed dims, heads, depths, head width). nano is ours, for tests and the demo; lvt and the
# pvt_v2 are built in others.py.
MODELS = {
    "nano": ((16, 32, 64, 128), (1, 2, 4, 8), (1, 1, 1, 1), 64),
    "b0": ((32, 64, 160, 256), (1, 2, 5, 8), (2, 2, 2, 2), 256),
    "b1": ((64, 128, 320, 512), (1, 2, 5, 8), (2, 2, 2, 2), 256),
    "b2": ((64, 128, 320, 512), (1, 2, 5, 8), (3, 4, 6, 3), 768),
    "b3": ((64, 128, 320, 512), (1, 2, 5, 8), (3, 4, 18, 3), 768),
    "b4": ((64, 128, 320, 512), (1, 2, 5, 8), (3, 8, 27, 3), 768),
    "b5": ((64, 128, 320, 512), (1, 2, 5, 8), (3, 6, 40, 3), 768),
    "lvt": ((64, 64, 160, 256), (2, 2, 5, 8), (2, 2, 2, 2), 256),
}
MODELS |= {f"pvt_v2_b{n}": (*MODELS[f"b{n}"][:3], 128) for n in range(6)}  # the shapes of MiT
NAMES = (*MODELS, *cnn.MODELS)  # every model of `build`; the CNNs are teachers only
PATCHES = ((7, 4), (3, 2), (3, 2), (3, 2))  # kernel and stride of the stages' patch embeddings
SR_RATIOS = (8, 4, 2, 1)  # keys and values come from a map this many times smaller per side


# ------------------------------------------------------------------------------------------------
# the encoder


def to_map(tokens, H, W):
    """(B, H*W, C) -> (B, C, H, W), a view: in memory it is a channels-last map already."""
    return tokens.transpose(1, 2).unflatten(2, (H, W))


def to_tokens(x):
    """(B, C, H, W) -> (B, H*W, C); without a copy if the map is channels-last."""
    return x.flatten(2).transpose(1, 2)


class LayerNorm(nn.LayerNorm):
    """Keeps bfloat16: under a GPU's autocast it, and all it is added to, would be float32.

    On a CPU torch's kernel sums the gradients of weight and bias in bfloat16: over ten thousand
    tokens most of the sum is lost. So there both are applied by operations of their own.
    """

    def forward(self, x):
        if x.dtype != torch.bfloat16:
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with full_precision(x):
            if x.is_cuda:
                return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
            return F.layer_norm(x, self.normalized_shape, None, None, self.eps) * weight + bias


class PatchEmbed(nn.Module):
    """Overlapping patch embedding (SegFormer, section 3.1): strided conv, LayerNorm on tokens."""

    def __init__(self, c_in, c_out, kernel, stride):
        super().__init__()
        self.proj = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)
        self.norm = LayerNorm(c_out, eps=1e-5)

    def forward(self, x):
        x = self.proj(x)  # (B, C, H, W)
        return self.norm(to_tokens(x)), x.shape[2], x.shape[3]  # (B, H*W, C)


def written_out(q, k, v):
    """`attend` in three operations. (torch's SDPBackend.MATH has more and is even slower.)"""
    return ((q * q.shape[3] ** -0.5) @ k.mT).softmax(dim=3) @ v


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v of queries (B, heads, N, d) and keys, values (B, heads, M, d).

    One fused call, except where that is slower: the CPU kernel multiplies bfloat16 as float32,
    and sr_ratio keeps the N x M matrix small enough to compute it explicitly.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= 512:
        return written_out(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Self-attention with keys and values from a map reduced by sr_ratio per side (eq. 1-2)."""

    def __init__(self, dim, heads, sr_ratio, qkv_bias=True):
        super().__init__()
        self.heads, self.sr_ratio = heads, sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = LayerNorm(dim, eps=1e-5)

    def queries(self, x, H, W):  # LVT's look at the map (others.py)
        return self.q(x)  # (B, N, C)

    def forward(self, x, H, W):
        q = self.queries(x, H, W)
        if self.sr_ratio > 1:
            x = self.norm(to_tokens(self.sr(to_map(x, H, W))))  # (B, M, C), M about N / sr_ratio^2
        k, v = self.kv(x).chunk(2, dim=-1)  # (B, M, C)
        # (B, N, C) -> (B, heads, N, C / heads); M in place of N for k and v
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = attend(q, k, v)  # (B, heads, N, C / heads)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, N, C)


class MixFFN(nn.Module):
    """MLP with a 3x3 depth-wise conv inside, which also encodes position (eq. 3)."""

    def __init__(self, dim, ratio=4):
        super().__init__()
        hidden = dim * ratio
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x, H, W):
        x = self.dwconv(to_map(self.fc1(x), H, W))  # (B, ratio * C, H, W)
        return self.fc2(F.gelu(to_tokens(x)))  # (B, N, C)


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)); both called with tokens, height and width.

    eps: as released, 1e-6 here and after a stage, 1e-5 elsewhere.
    """

    def __init__(self, dim, attn, mlp, drop_path, eps=1e-6):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = mlp
        self.drop_path = Drop(drop_path, dims=1)

    def forward(self, x, H, W):
        x = x + self.drop_path(self.attn(self.norm1(x), H, W))
        return x + self.drop_path(self.mlp(self.norm2(x), H, W))


class Stage(nn.Module):
    """Patch embedding, blocks, LayerNorm. Returns the map (B, C, H, W) and the patch embedding.

    drop_paths: a rate per block, so their number is the depth.
    """

    def __init__(self, c_in, dim, patch, heads, sr_ratio, mlp_ratio, drop_paths):
        super().__init__()
        self.patch_embed = PatchEmbed(c_in, dim, *patch)
        self.blocks = nn.ModuleList(
            Block(dim, Attention(dim, heads, sr_ratio), MixFFN(dim, mlp_ratio), p)
            for p in drop_paths
        )
        self.norm = LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        embedding, H, W = self.patch_embed(x)  # (B, H*W, C)
        x = embedding
        for block in self.blocks:
            x = block(x, H, W)
        return to_map(self.norm(x), H, W), embedding


class Encoder(nn.Module):
    """Stages at strides 4, 8, 16, 32. Images (B, 3, H, W) -> four maps, four patch embeddings."""

    def __init__(self, stages):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.apply(init_weights)

    def forward(self, x):
        features, embeddings = [], []
        for stage in self.stages:
            x, embedding = stage(x)
            features.append(x)
            embeddings.append(embedding)
        return tuple(features), tuple(embeddings)


def mit(dims, heads, depths, drop_path, mlp_ratios=(4, 4, 4, 4)):
    """The Mix Transformer encoder."""
    inputs, rates = (3, *dims[:3]), drop_path_rates(depths, drop_path)
    return Encoder(map(Stage, inputs, dims, PATCHES, heads, SR_RATIOS, mlp_ratios, rates))


def drop_path_rates(depths, last):
    """Stochastic depth, per stage and block: from 0 at the first block linearly to `last`."""
    rates = iter([last * k / (sum(depths) - 1) for k in range(sum(depths))])
    return [[next(rates) for _ in range(depth)] for depth in depths]


def init_weights(m):
    """The original initialisation: truncated normal for Linear, He (fan out) for conv, biases 0."""
    if isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)
    elif isinstance(m, nn.Conv2d):
        fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
        nn.init.normal_(m.weight, 0, math.sqrt(2 / fan_out))
        nn.init.zeros_(m.bias)


# ------------------------------------------------------------------------------------------------
# the head, and encoder and head as one network


class SegFormerHead(nn.Module):
    """All-MLP head (SegFormer, section 3.2, eq. 4).

    As written, each stage's map goes through its own Linear to `width` channels, is resized to
    stride 4, and a 1x1 conv fuses the concatenation [stage 4, 3, 2, 1]. Resizing acts on each
    channel separately and its weights sum to one, so it commutes with per-pixel linear maps:
    `merged` multiplies the two matrices of a stage first and applies the product at the stage's
    own, small size. Same function and parameters, fewer multiplications (B2: 4.2 instead of 80.9
    GMACs).
    """

    def __init__(self, dims, width, num_classes, dropout):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(dim, width) for dim in dims)  # stages 1 to 4
        self.fuse = nn.Conv2d(4 * width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.drop = Drop(dropout, dims=2)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.merged = True
        nn.init.kaiming_normal_(self.fuse.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features):
        x = self.fuse_merged(features) if self.merged else self.fuse_as_written(features)
        decoded = self.norm(x)  # (B, width, H/4, W/4)
        return self.classifier(self.drop(F.relu(decoded))), decoded

    def fuse_as_written(self, features):
        size = features[0].shape[2:]
        maps = [to_map(fc(to_tokens(f)), *f.shape[2:]) for fc, f in zip(self.linears, features)]
        # maps: 4 x (B, width, H_i, W_i)
        return self.fuse(torch.cat([resize(m, size) for m in reversed(maps)], dim=1))

    def fuse_merged(self, features):
        size = features[0].shape[2:]
        enlarge = resize_by_products if features[0].is_cuda else resize  # the faster there
        fuse = self.fuse.weight.flatten(1).chunk(4, dim=1)  # 4 x (width, width), stages 4 to 1
        total = 0
        for fc, f, w in zip(self.linears, features, reversed(fuse)):
            y = F.linear(to_tokens(f), w @ fc.weight, w @ fc.bias)  # (B, H_i * W_i, width)
            total = total + enlarge(to_map(y, *f.shape[2:]), size)
        return total  # (B, width, H/4, W/4)


class Segmenter(nn.Module):
    """An encoder (images -> features, embeddings) and a head (features -> logits, decoded)."""

    has_embeddings = True  # its outputs have patch embeddings

    def __init__(self, name, encoder, head):
        super().__init__()
        self.name, self.channels = name, MODELS[name][0]
        self.encoder, self.head = encoder, head
        self.num_classes, self.width = head.classifier.weight.shape[:2]

    def forward(self, images, head=True):
        if min(images.shape[2:]) < 32:
            h, w = images.shape[2:]
            raise UserError(f"an image of {h}x{w} pixels: {self.name} needs 32x32 at least")
        features, embeddings = self.encoder(images)
        logits, decoded = self.head(features) if head else (None, None)
        return Output(logits, features, embeddings, decoded)


def build(name, num_classes, drop_path=None, dropout=None, head_width=None):
    """A net with random weights.

    name: one of NAMES; num_classes: outputs per pixel; drop_path, dropout: rates of stochastic
    depth and of the head's dropout (None: as published, 0 in lvt, 0.1 in all others); head_width:
    channels of the head (None: as in MODELS). The last three are for transformers only.
    """
    import others  # not at the top: others.py imports this file for its blocks

    if name not in NAMES:
        raise UserError(f"unknown model '{name}': choose one of {', '.join(NAMES)}")
    if not 1 <= num_classes <= 255:
        raise UserError(f"{num_classes} classes: 1 to 255 are possible (255 in a label = ignore)")
    if name in cnn.MODELS:
        return cnn.CNN(name, num_classes)
    published = 0.0 if name == "lvt" else 0.1
    drop_path = published if drop_path is None else drop_path
    dropout = published if dropout is None else dropout
    dims, heads, depths, width = MODELS[name]
    head = dims, head_width or width, num_classes, dropout
    if name == "lvt":
        return Segmenter(name, others.lvt(dims, heads, depths, drop_path), SegFormerHead(*head))
    if name.startswith("pvt_v2"):
        encoder = mit(dims, heads, depths, drop_path, others.PVT_MLP_RATIOS[name])
        return Segmenter(name, encoder, others.SemanticFPNHead(*head))
    return Segmenter(name, mit(dims, heads, depths, drop_path), SegFormerHead(*head))


def count_parameters(net):
    return sum(p.numel() for p in net.parameters())


# ------------------------------------------------------------------------------------------------
# weights in and out


def save(path, net, **facts):
    """Write a deployable checkpoint: the weights and all it takes to rebuild and use the net.

    facts: classes (names), palette (RGB triples), mean and std of the input, ... plain values only.
    """
    shape = dict(model=net.name, num_classes=net.num_classes, head_width=net.width)
    if net.name in MODELS:
        shape["heads"] = MODELS[net.name][1]  # which no tensor's shape shows
    save_tensors(
        path, dict(format=weights.FORMAT) | shape | facts | {"state_dict": net.state_dict()}
    )


def fingerprint(net):
    """A hash of a net's weights."""
    found = hashlib.sha256()
    for name, x in net.state_dict().items():
        found.update(name.encode() + x.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def check_finite(source, state):
    """UserError if weights are not numbers: the training that wrote them had failed."""
    bad = [k for k, x in state.items() if not x.isfinite().all()]
    if bad:
        raise UserError(f"{source}: its weights are not all finite: {some(bad, 2)}")


def load(source):
    """(net in eval mode, facts) of a complete checkpoint: a file, a folder or a name on the hub.

    source: what `save` wrote, or anything that `weights.read` takes and that has a segmentation
    head. Missing facts are None (classes, palette, dataset, ...), mean and std ImageNet's, dtype
    float32.
    """
    state, facts = weights.read(source)
    name, num_classes, width = recognise(source, state, facts)
    net = build(name, num_classes, head_width=width)
    ours = net.state_dict()
    misshapen = [k for k in ours if k in state and state[k].shape != ours[k].shape]
    missing = [k for k in ours if k not in state and not k.endswith("num_batches_tracked")]
    wrong = [listed(missing, "missing"), listed(misshapen, "of another shape")]
    if any(wrong):
        raise UserError(f"{source}: damaged, or no {name}: {'; '.join(filter(None, wrong))}")
    state = {k: v for k, v in state.items() if k in ours}
    check_finite(source, state)
    net.load_state_dict(state, strict=False)
    defaults = dict(mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD), dtype="float32")
    defaults |= dict.fromkeys(("dataset", "classes", "palette", "short_side", "resize", "void"))
    facts = defaults | {k: v for k, v in facts.items() if v is not None}
    names = facts["classes"]
    if names and len(names) + (facts["void"] is not None) != num_classes:
        print(f"!!! {source}: {len(names)} class names for {num_classes} outputs: not used")
        facts |= dict(classes=None, palette=None)
    for key, least in (("mean", -math.inf), ("std", 0)):
        value = facts[key]
        if len(value) != 3 or not all(least < v < math.inf for v in value):
            raise UserError(f"{source}: {key} {value}: should be a number for each of RGB")
    return net.eval(), facts


def photo_side(facts):
    """The shorter side to which photos are resized for a net; None if its facts name none."""
    return facts["resize"] or facts["short_side"]


def recognise(source, state, facts):
    """(name in NAMES, number of classes, head width), as our file says or the tensors' shapes do.

    Takes these out of the facts, in which `save` wrote them.
    """
    said = [facts.pop(key, None) for key in ("model", "num_classes", "head_width")]
    heads = facts.pop("heads", None)
    if None not in said and said[0] in NAMES:
        if said[0] not in MODELS or heads in (None, MODELS[said[0]][1]):
            return said
    if "backbone.layer1.0.conv1.weight" in state:
        name, num_classes = cnn.recognise(state)
        if not (name and num_classes):
            problem = "without the head of a DeepLabV3 or FCN" if name else "of another depth"
            raise UserError(f"{source}: a ResNet {problem}; --teacher-init takes its backbone")
        return name, num_classes, None
    pyramid = "head.laterals.0.weight" in state
    if "head.classifier.weight" not in state or not (pyramid or "head.fuse.weight" in state):
        problem = (
            "an encoder without a head that we know; as a start of training it will do "
            "(--teacher-init, --student-init)"
        )
        if 0 in encoder_shape(state)[0]:
            problem = "no SegFormer and no ResNet in a layout that we know"
        raise UserError(f"{source}: {problem}")
    dims, depths = encoder_shape(state)
    if state["head.classifier.weight"].ndim < 2:
        raise UserError(f"{source}: damaged, its classifier is no matrix")
    num_classes, width = state["head.classifier.weight"].shape[:2]
    for name, shape in MODELS.items():
        if name.startswith("pvt_v2") != pyramid:  # their encoders have the shapes of MiT
            continue
        if shape[0] == dims and shape[2] == depths and heads in (None, shape[1]):
            return name, num_classes, width
    raise UserError(
        f"{source}: channels {dims}, depths {depths}, heads {heads}: none of {', '.join(MODELS)}"
    )


def encoder_shape(state):
    """(channels, depths) of the stages of a MiT, PVTv2 or LVT, 0 where tensors are missing."""
    norms = (f"encoder.stages.{i}.patch_embed.norm.bias" for i in range(4))
    dims = tuple(state[name].numel() if name in state else 0 for name in norms)
    blocks = re.findall(r"encoder\.stages\.(\d)\.blocks\.\d+\.norm1\.weight", " ".join(state))
    return dims, tuple(blocks.count(str(i)) for i in range(4))


def load_weights(net, source):
    """Copy into `net` the tensors of a checkpoint that fit it, and print "loaded N of M tensors".

    source: anything that `weights.read` takes: a file, a folder, a name on the hub, with or without
    a head. If its head has another number of classes, the net's is left as it is, with a warning.
    Raises UserError if the encoder differs: a part of it would be no useful start.
    """
    state, facts = weights.read(source)
    ours, heads = net.state_dict(), facts.get("heads")
    fits = {k: v for k, v in state.items() if k in ours and v.shape == ours[k].shape}
    check_encoder(net.name, source, state, ours, fits)
    if heads and net.name in MODELS and tuple(heads) != MODELS[net.name][1]:
        own = MODELS[net.name][1]
        raise UserError(f"{source}: {tuple(heads)} attention heads, a {net.name} has {own}")
    check_finite(source, fits)
    net.load_state_dict(fits, strict=False)
    print(f"{source}: loaded {len(fits)} of {len(ours)} tensors")
    misshapen = [k for k in state if k in ours and k not in fits]
    for line in (
        listed([k for k in ours if k not in state], "missing"),
        listed([k for k in state if k not in ours], "not used"),
        listed(misshapen, "of another shape, left as they were"),
    ):
        if line:
            print(f"  {line}")
    for name in {"head.classifier.weight", cnn.CLASSIFIER} & {*misshapen}:
        (theirs, width), (classes, ours_wide) = state[name].shape[:2], ours[name].shape[:2]
        difference = f"{theirs} classes, this one {classes}"
        if theirs == classes:
            difference = f"{width} channels, this one {ours_wide}"
        print(f"  warning: its head has {difference}: not loaded")


def check_encoder(name, source, state, ours, fits):
    """UserError unless the encoder of `state` is that of our net, called `name`.

    ours: the net's own state dict; fits: the tensors of `state` that fit into it.
    """
    encoder = [k for k in ours if k.startswith(("encoder.", "backbone."))]
    encoder = [k for k in encoder if not k.endswith("num_batches_tracked")]
    lacking = [k for k in encoder if k not in fits]
    blocks = (k for k in state if ".blocks." in k or k.startswith("backbone.layer"))
    deeper = [k for k in blocks if k not in ours]
    if not (lacking or deeper):
        return
    theirs = "a ResNet"
    if "backbone.layer1.0.conv1.weight" not in state:
        shape = encoder_shape(state)
        names = [n for n, (dims, _, depths, _) in MODELS.items() if (dims, depths) == shape]
        theirs = " or ".join(names) or "channels {}, depths {}".format(*shape)
    difference = f"of {len(encoder)} tensors missing or of another shape"
    difference = listed(lacking, difference) or listed(deeper, "tensors too many")
    raise UserError(f"{source}: not the encoder of a {name}, but {theirs}: {difference}")


def listed(names, what):
    """'3 missing: a, b, c', or '' if there are none; at most six names."""
    return f"{len(names)} {what}: {some(names, 6)}" if names else ""
