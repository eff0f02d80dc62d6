"""
What all networks here share: their output, resizing and dropping.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Output(NamedTuple):
    """A network's output for images (B, 3, H, W).

    K: classes. In stage i = 1 .. 4, C_i: channels, H_i, W_i: H, W divided by 4, 8, 16, 32 in a
    transformer, by 4, 8, 8, 8 in a CNN. h, w: H, W divided by 4 in a transformer, by 8 in a CNN.
    All are rounded up.
    """

    logits: torch.Tensor | None  # (B, K, h, w); None if the head was skipped
    features: tuple  # 4 x (B, C_i, H_i, W_i)
    embeddings: tuple  # 4 x (B, H_i * W_i, C_i); () of a CNN
    decoded: torch.Tensor | None = None  # (B, width, h, w): the head's last map, its last ReLU,
    # if one follows it, not yet applied


def resize(x, size):
    """Bilinear to size (h, w), half-pixel centres (align_corners=False): as for all logits here."""
    concrete = isinstance(x.shape[2], int)  # not a tracer's symbol, which cannot be compared
    if concrete and tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def resize_by_products(x, size):
    """`resize`, see `by_products`. In bfloat16 so are its weights: exact to 2, 4 and 8 times."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return by_products(x, lambda one, n: F.interpolate(one, size=n, mode="linear"), size)


def by_products(x, along, size):
    """Map (B, C, h, w) at size (H, W), rows and then columns by a linear `along(lines, length)`.

    What `along` makes of the unit vectors is its matrix; products with that are on a GPU faster
    than torch's kernels for maps. Without a copy if the map is channels-last, as the result is.
    """
    B, C, h, w = x.shape
    H, W = size
    units = (torch.eye(n, device=x.device)[None] for n in (h, w))  # the unit vectors, (1, n, n)
    # along: (1, h, h) -> (1, h, H), the transpose of the matrix (H, h); likewise (W, w)
    rows, columns = (along(unit, n)[0].mT.to(x.dtype) for unit, n in zip(units, size))
    x = rows.expand(B, H, h) @ x.permute(0, 2, 3, 1).flatten(2)  # (B, H, w * C)
    return (columns @ x.view(B, H, w, C)).permute(0, 3, 1, 2)  # (B, C, H, W)


def full_precision(x):
    """A context without autocast on x's device: matrix products of float32 stay float32."""
    return torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False)


def draws(shape, shard, device):
    """Uniform numbers (B, ...) in [0, 1), this process's share of those drawn for the whole batch.

    shard = (rank, world size): N processes with one seed draw what a single process would.
    """
    rank, world = shard
    return torch.rand(world * shape[0], *shape[1:], device=device).chunk(world)[rank]


class Drop(nn.Module):
    """Zero whole slices of a batch with probability p and scale the others by 1 / (1 - p).

    dims=1 drops samples (stochastic depth, Huang et al. 2016), dims=2 channels (Dropout2d), dims=4
    single values (Dropout).
    `shard` is that of `draws`.
    """

    def __init__(self, p, dims):
        super().__init__()
        self.p, self.dims, self.shard = p, dims, (0, 1)

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        coins = draws(x.shape[: self.dims], self.shard, x.device)
        keep = (coins >= self.p).to(x.dtype) / (1 - self.p)
        return x * keep.view(*keep.shape, *[1] * (x.ndim - self.dims))
