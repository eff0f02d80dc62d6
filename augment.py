"""
Training batches: random windows of the decoded images, cut on the host, resampled on the device.

A batch travels as the source pixels it needs, the positions at which to sample them, and finished
labels of the same positions. Scale, crop, flip and colour then run for all images at once on the
device. All randomness of an image comes from the seed and the image's place in the endless stream
of shuffled epochs: batches are the same however many processes or workers make them.
"""

import dataclasses
import functools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from distill import IGNORE
from files import UserError


@dataclasses.dataclass
class Augment:
    """What is done to an image on its way into a batch."""

    crop: tuple  # (H, W) of the batch
    scale: tuple = (0.5, 2.0)  # of the image before the crop, uniform in the logarithm
    flip: bool = True
    colour: float = 1.0  # strength of the photometric change, 0 = none
    fit: bool = False  # resize the whole image to `crop` instead, and shift it by up to 2 pixels
    label_stride: int = 1  # labels at 1/stride of the crop, by nearest


@functools.lru_cache(4)  # a batch may reach into the next epoch, of two streams
def epoch_order(epoch, n, seed):
    return np.random.default_rng([seed, 1, epoch]).permutation(n)


def sample_indices(step, batch_size, n, seed, labelled=0):
    """The indices of batch `step` (from 0) in an endless stream of shuffled epochs over n items.

    With only the first `labelled` items labelled, they and the others alternate, each in epochs of
    their own: every second one has a label, however few there are.
    """
    at = range(step * batch_size, (step + 1) * batch_size)
    if not 0 < labelled < n:
        return [int(epoch_order(p // n, n, seed)[p % n]) for p in at]
    groups = ((0, labelled), (labelled, n - labelled))  # first item, how many
    drawn = [(*groups[p % 2], p // 2) for p in at]
    return [first + int(epoch_order(p // size, size, seed)[p % size]) for first, size, p in drawn]


def colour_matrix(rng, strength):
    """(3, 4): brightness, contrast, saturation and hue in one affine map of [0, 1] RGB."""
    grey = np.array([[0.299, 0.587, 0.114]] * 3)
    turn = rng.uniform(-1, 1) * 0.3 * strength  # radians, about the grey axis
    k = np.ones(3) / np.sqrt(3)
    cross = np.array([[0, -k[2], k[1]], [k[2], 0, -k[0]], [-k[1], k[0], 0]])
    hue = np.cos(turn) * np.eye(3) + np.sin(turn) * cross + (1 - np.cos(turn)) * np.outer(k, k)
    saturation, contrast = 1 + rng.uniform(-0.5, 0.5, 2) * strength
    m = contrast * (saturation * np.eye(3) + (1 - saturation) * grey) @ hue
    bias = 0.5 * (1 - contrast) + rng.uniform(-0.125, 0.125) * strength
    return np.column_stack([m, np.full(3, bias)]).astype(np.float32)


def source_positions(n, scale, start, flip, size):
    """Where n output pixels lie along one axis of an image of `size` pixels scaled by `scale`.

    Returns source positions (n,), pixel centres at whole numbers, clamped to the image, and whether
    they were inside (n,). start: the first output pixel's position in the scaled image.
    """
    at = np.arange(n)[::-1] if flip else np.arange(n)
    at = (start + at + 0.5) / scale - 0.5
    return at.clip(0, size - 1), (at >= -0.5) & (at < size - 0.5)


def random_geometry(rng, size, augment):
    """For one image of `size` (H, W): the arguments of `source_positions`, for y and for x."""
    low, high = augment.scale
    scale = np.exp(rng.uniform(np.log(low), np.log(high)))
    flip = bool(augment.flip and rng.random() < 0.5)
    axes = []
    for d in (0, 1):
        n, full = augment.crop[d], size[d]
        s = n / full if augment.fit else scale
        room = round(full * s) - n  # what is cut off, or, if negative, lies outside
        low, high = (-2, 2) if augment.fit else (min(0, room), max(0, room))
        start = rng.integers(low, high + 1)
        axes.append((n, s, int(start), flip and d == 1, full))
    return axes


def host_batch(split, step, batch_size, seed, augment, rows):
    """Batch `step` as it travels: windows cut from the images, positions in them, and labels.

    rows: the slice of the batch that this process works on.
    """
    items = []
    labelled = getattr(split, "labelled", 0)  # of a data.Selection
    indices = sample_indices(step, batch_size, len(split), seed, labelled)
    for k in range(batch_size)[rows]:
        rng = np.random.default_rng([seed, 2, step * batch_size + k])  # its place in the stream
        image, label = split.pair(indices[k])
        if augment.fit:  # as eval.prepare does, with antialiasing; black around it
            image = np.asarray(Image.fromarray(image).resize(augment.crop[::-1], Image.BILINEAR))
            image = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        item, window = {"colour": colour_matrix(rng, augment.colour)}, []
        axes = random_geometry(rng, label.shape, augment)
        for axis, (n, scale, start, flip, size) in zip("yx", axes):
            if augment.fit:  # the image has been scaled already
                scale, size, start = 1, n + 4, start + 2
            at, _ = source_positions(n, scale, start, flip, size)  # (n,)
            low, high = int(at.min()), int(np.ceil(at.max())) + 1
            window.append(slice(low, high))
            item[axis] = (at - low).astype(np.float32)
        item["label"] = nearest_label(label, axes, augment.label_stride)
        item["image"] = image[tuple(window)]
        items.append(item)
    return collate(items)


def nearest_label(label, axes, stride):
    """The label (H, W) of a crop, at 1/stride of its size, by nearest: (h, w), IGNORE outside.

    axes: as `random_geometry` returns them.
    """
    positions = []
    for n, scale, start, flip, size in axes:
        ratio = -(-n // stride) / n  # label pixels per image pixel
        at, inside = source_positions(round(n * ratio), scale * ratio, start * ratio, flip, size)
        positions.append((np.floor(at + 0.5).astype(np.int64), inside))
    (y, y_inside), (x, x_inside) = positions  # (h,) and (w,)
    label = label[y].take(x, axis=1)  # (h, w); rows first: four times as fast
    label[~y_inside], label[:, ~x_inside] = IGNORE, IGNORE
    return label


def collate(items):
    """Stack the items; image windows are padded to their largest height and width."""
    h = max(item["image"].shape[0] for item in items)
    w = max(item["image"].shape[1] for item in items)
    images = np.zeros((len(items), h, w, 3), np.uint8)
    for buffer, item in zip(images, items):
        image = item.pop("image")
        buffer[: image.shape[0], : image.shape[1]] = image
    batch = {k: torch.from_numpy(np.stack([item[k] for item in items])) for k in items[0]}
    return batch | {"image": torch.from_numpy(images)}


def device_batch(batch, device, mean, std):
    """Host batch -> normalised float images (B, 3, h, w) and uint8 labels, both on the device.

    Labels are (B, h, w), or 1/label_stride of that, rounded up. Outside the image the label is
    IGNORE, and the image's edge is repeated, or black if it was fitted. (With zeros a patch
    embedding from scratch, whose biases are 0, gives zeros to its LayerNorm, which divides by them:
    gradients of 1e6 in the first steps.)
    """
    batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    images = normalise(resample(batch), mean, std)
    return images.contiguous(memory_format=torch.channels_last), batch["label"]


def resample(batch):
    """A batch's windows, sampled at its positions y (B, h), x (B, w), recoloured: (B, 3, h, w)."""
    images = batch["image"].permute(0, 3, 1, 2).float() / 255  # channels-last (B, 3, H, W)
    (H, W), B = images.shape[2:], len(images)
    y, x = (2 * batch["y"] + 1) / H - 1, (2 * batch["x"] + 1) / W - 1  # grid_sample's coordinates
    h, w = y.shape[1], x.shape[1]
    grid = torch.stack([x[:, None, :].expand(B, h, w), y[:, :, None].expand(B, h, w)], dim=3)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    colour = batch["colour"]
    images = torch.einsum("bij,bjhw->bihw", colour[:, :, :3], images) + colour[:, :, 3, None, None]
    return images.clamp(0, 1)


def normalise(images, mean, std):
    """Images (B, 3, H, W) in [0, 1] -> what a net expects: (images - mean) / std by channel."""
    mean, std = (  # a blocking copy to a GPU would wait for all its queued work
        torch.tensor(v).to(images.device, non_blocking=True).view(1, 3, 1, 1) for v in (mean, std)
    )
    return (images - mean) / std


class Batches(torch.utils.data.Dataset):
    """Item `step` is the host batch of that step: a DataLoader over it can start anywhere.

    batch_size counts all processes; process `rank` of `world` gets its share. make: a function
    called like host_batch. An error in the data is returned, for `loop.load` to raise, so that no
    worker process wraps it in a traceback.
    """

    def __init__(self, split, batch_size, seed, augment, rank=0, world=1, make=host_batch):
        self.split, self.batch_size, self.seed, self.augment = split, batch_size, seed, augment
        self.make = make
        share = batch_size // world
        self.rows = slice(rank * share, (rank + 1) * share)

    def __getitem__(self, step):
        try:
            return self.make(self.split, step, self.batch_size, self.seed, self.augment, self.rows)
        except UserError as e:
            return e
