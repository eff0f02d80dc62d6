"""
The other transformers that TransKD was tried on, built of model.py's blocks: PVTv2 and LVT.

    PVTv2    Wang et al., "PVT v2", arXiv 2106.13797: MiT with wider MLPs, and a Semantic-FPN head
    LVT      Yang et al., "Lite Vision Transformer with Enhanced Self-Attention", CVPR 2022, arXiv
             2112.10809: two attentions of its own, and the SegFormer head

`model.build("pvt_v2_b0", K)` and `model.build("lvt", K)` make them. They are called like SegFormer
and return the same `nets.Output`, with two differences, as in TransKD's release: PVTv2's `decoded`
is the sum of its head's four branches, each of which ends in a ReLU, and no ReLU follows it; LVT's
features have no LayerNorm, and its embeddings are those before their LayerNorm.
"""

import torch
import torch.nn.functional as F
from torch import nn

import model
from model import to_map, to_tokens
from nets import Drop, resize

# ------------------------------------------------------------------------------------------------
# PVTv2

# With these MLP ratios, the encoder is MiT (model.mit): overlapping patch embeddings, keys
# and values from a map reduced by a strided conv, a depth-wise conv in the MLP; B5 is MiT-B5.
PVT_MLP_RATIOS = {f"pvt_v2_b{n}": (4, 4, 4, 4) if n == 5 else (8, 8, 4, 4) for n in range(6)}


class SemanticFPNHead(nn.Module):
    """Feature pyramid (Lin et al., arXiv 1612.03144), Semantic FPN (Kirillov et al., 1901.02446).

        l_4 = Conv1x1(F_4),   l_i = Conv1x1(F_i) + nearest(l_{i+1})             256 channels
        b_i = Conv3x3(l_i), then i - 1 times ReLU(Conv3x3) and bilinear x2;     `width` channels
              for i = 1 a ReLU(Conv3x3) and no x2
        logits = Conv1x1(Dropout2d(b_1 + b_2 + b_3 + b_4))

    No norm anywhere, as in TransKD's release. `decoded` is the sum of the b_i, before the dropout.
    Where a stage's size is odd, twice the next one's is too large: b_i is resized to stage 1's.
    """

    def __init__(self, dims, width, num_classes, dropout, pyramid=256):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(dim, pyramid, 1) for dim in dims)
        self.smooths = nn.ModuleList(nn.Conv2d(pyramid, pyramid, 3, padding=1) for _ in dims)
        self.branches = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(pyramid if k == 0 else width, width, 3, padding=1)
                for k in range(max(1, i))
            )
            for i in range(4)
        )
        self.apply(model.init_weights)
        self.drop = Drop(dropout, dims=2)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features):
        maps = [lateral(f) for lateral, f in zip(self.laterals, features)]  # 4 x (B, 256, H_i, W_i)
        for i in (2, 1, 0):
            size = tuple(maps[i].shape[2:])
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=size, mode="nearest")
        decoded = 0
        for i, branch in enumerate(self.branches):
            x = self.smooths[i](maps[i])
            for conv in branch:
                x = F.relu(conv(x))
                if i > 0:
                    x = resize(x, [2 * n for n in x.shape[2:]])
            decoded = decoded + resize(x, maps[0].shape[2:])  # (B, width, H/4, W/4)
        return self.classifier(self.drop(decoded)), decoded


# ------------------------------------------------------------------------------------------------
# LVT


class ConvolutionalAttention(nn.Module):
    """CSA, convolutional self-attention: tokens (B, N, C) -> (B, N, C), within 3x3 windows.

    The windows are centred on every second row and column, at (2r, 2c). In each, for each head,

        A = softmax(Linear(mean of the pixels 2r, 2r + 1 by 2c, 2c + 1) / sqrt(C / heads))     9 x 9
        y = A v,   v_k = W_k x_k       k = 1 .. 9: each position of the window has its own matrix

    with zeros outside the map. Where windows overlap, their y are added; a Linear follows.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.attn = nn.Linear(dim, 81 * heads)
        self.weight = nn.Parameter(torch.empty(9 * dim, dim, 1, 1))  # the nine W_k
        self.proj = nn.Linear(dim, dim)
        nn.init.normal_(self.weight, std=(2 / (9 * dim)) ** 0.5)

    def forward(self, x, H, W):
        x = to_map(x, H, W)  # (B, C, H, W)
        # ceil(H / 2) rows; the last means may reach outside the map, where the edge is repeated
        centres = F.avg_pool2d(F.pad(x, (0, W % 2, 0, H % 2), mode="replicate"), 2)  # (B, C, h, w)
        a = self.attn(to_tokens(centres)).unflatten(2, (self.heads, 9, 9))
        a = (a * self.scale).softmax(dim=-1)  # (B, h*w, heads, 9, 9)
        v = F.unfold(x, 3, padding=1, stride=2).unflatten(1, (-1, 9))  # (B, C, 9, h*w)
        v = v.transpose(1, 2).flatten(1, 2).unflatten(2, centres.shape[2:])  # (B, 9 * C, h, w)
        v = F.conv2d(v, self.weight, groups=9)  # (B, 9 * C, h, w)
        v = v.flatten(2).unflatten(1, (9, self.heads, -1))  # (B, 9, heads, C / heads, h*w)
        y = torch.einsum("bnhij,bjhcn->bhcin", a, v).flatten(1, 3)  # (B, C * 9, h*w)
        y = F.fold(y, (H, W), 3, padding=1, stride=2)  # (B, C, H, W)
        return self.proj(to_tokens(y))


class RecursiveAtrousAttention(model.Attention):
    """RASA, recursive atrous self-attention: tokens (B, N, C) -> (B, N, C), two passes of one net.

        q = sum over d = 1, 3, 5 of SiLU(DWConv3x3(x W_q, dilation d))      one kernel for all three
        y = SiLU(attention(x)),   output = SiLU(attention(x + y))

    with keys and values as in MiT; q, k and v have no biases.
    """

    def __init__(self, dim, heads, sr_ratio):
        super().__init__(dim, heads, sr_ratio, qkv_bias=False)
        self.ds = nn.Parameter(torch.empty(dim, 1, 3, 3))
        nn.init.kaiming_uniform_(self.ds)

    def queries(self, x, H, W):
        q = to_map(self.q(x), H, W)
        scales = (F.conv2d(q, self.ds, padding=d, dilation=d, groups=q.shape[1]) for d in (1, 3, 5))
        return to_tokens(sum(F.silu(s) for s in scales))

    def forward(self, x, H, W):
        y = F.silu(super().forward(x, H, W))
        return F.silu(super().forward(x + y, H, W))


class MLP(nn.Module):
    """LVT's MLP: two Linears on tokens (B, H*W, C) with a GELU between, and no convolution."""

    def __init__(self, dim, ratio):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * ratio)
        self.fc2 = nn.Linear(dim * ratio, dim)

    def forward(self, x, H, W):
        return self.fc2(F.gelu(self.fc1(x)))


class LVTStage(nn.Module):
    """Patch embedding and blocks. Returns the map (B, C, H, W) and the patch embedding.

    As in TransKD's release: the blocks take the embedding after its LayerNorm, but the one
    returned, and distilled, is that before it; and no LayerNorm follows the blocks.
    """

    def __init__(self, c_in, dim, patch, blocks):
        super().__init__()
        self.patch_embed = model.PatchEmbed(c_in, dim, *patch)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        x = self.patch_embed.proj(x)  # (B, C, H, W)
        H, W = x.shape[2:]
        embedding = to_tokens(x)  # (B, H*W, C)
        x = self.patch_embed.norm(embedding)
        for block in self.blocks:
            x = block(x, H, W)
        return to_map(x, H, W), embedding


def lvt(dims, heads, depths, drop_path):
    """The Lite Vision Transformer encoder: CSA and plain MLPs in stage 1, RASA and MixFFN after.

    `weight` and `ds` of the two attentions are initialised as released, all else as in MiT.
    """

    def block(i, rate):
        if i == 0:
            attn, mlp = ConvolutionalAttention(dims[i], heads[i]), MLP(dims[i], 4)
        else:
            attn = RecursiveAtrousAttention(dims[i], heads[i], model.SR_RATIOS[i])
            mlp = model.MixFFN(dims[i], 8 if i == 1 else 4)
        return model.Block(dims[i], attn, mlp, rate, eps=1e-5)

    rates = model.drop_path_rates(depths, drop_path)
    blocks = [[block(i, rate) for rate in rates[i]] for i in range(4)]
    return model.Encoder(map(LVTStage, (3, *dims[:3]), dims, model.PATCHES, blocks))
