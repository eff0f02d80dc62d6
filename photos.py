"""
Photos with one class each, in folders as ImageNet's: DIR/train/CLASS/*.jpg, DIR/val/CLASS/*.jpg.

Photos are used with a shorter side of at most `store` pixels: decoded once into a memory map or,
where that would be too large, by worker processes at every use, to the same pixels. Training takes
a random window of each (Szegedy et al., "Going Deeper with Convolutions", 2015, section 6), scoring
the middle.
"""

import dataclasses
import functools
import hashlib
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import augment
import catalog
import data
from files import UserError, some
from model import IMAGENET_MEAN, IMAGENET_STD

ASPECT = 3 / 4, 4 / 3  # smallest and largest width / height of a random window

# ------------------------------------------------------------------------------------------------
# a split


@dataclasses.dataclass
class Photos:
    """len(), pair(i): image (H, W, 3) uint8 and label int64, the class's index in `classes`."""

    folder: Path
    names: np.ndarray  # (N,) bytes, CLASS/FILE: one array, which worker processes share
    labels: np.ndarray  # (N,)
    classes: list
    store: int
    packed: data.Packed | None = None

    def __len__(self):
        return len(self.names)

    def pair(self, i):
        return self.image(i), self.labels[i]

    def path(self, i):
        return self.folder / os.fsdecode(self.names[i])

    @functools.cached_property
    def stats(self):
        """(N, 2): size, and time of change in ns, of every file; an array as `names` is."""
        found = (self.path(i).stat() for i in range(len(self)))
        return np.array([(stat.st_size, stat.st_mtime_ns) for stat in found])

    def image(self, i):
        if self.packed:
            return self.packed.image(i)
        image = catalog.read_image(self.path(i))
        return image if min(image.shape[:2]) <= self.store else to_short_side(image, self.store)


def to_short_side(image, side):
    """An image (H, W, 3) resized, with antialiasing, to a shorter side of `side`."""
    h, w = image.shape[:2]
    size = side * w // min(h, w), side * h // min(h, w)
    return np.asarray(Image.fromarray(image).resize(size, Image.BILINEAR))


def centre(image, size):
    """The middle (size, size, 3) of an image, which is enlarged first if it is smaller."""
    if min(image.shape[:2]) < size:
        image = to_short_side(image, size)
    top, left = (round((n - size) / 2) for n in image.shape[:2])
    return image[top : top + size, left : left + size]


def find(root, split, store, limit=None):
    """The photos in root/split/CLASS and its subfolders, sorted, class by class.

    limit: take only so many classes, the first by name.
    """
    folder = Path(root) / split
    layout = f"expected {root}/train/CLASS/*.jpg and {root}/val/CLASS/*.jpg"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {layout}")
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    if len(classes) < (least := limit or 2):
        raise UserError(f"{folder}: {len(classes)} folders of classes, {least} at least; {layout}")
    classes = classes[:limit]
    names, labels = [], []
    for label, name in enumerate(classes):
        found = []
        for where, subfolders, names_there in os.walk(folder / name):
            subfolders.sort()
            inside = os.path.relpath(where, folder)
            found += [f"{inside}/{f}" for f in sorted(names_there) if catalog.is_image(f)]
        if not found:
            raise UserError(
                f"{folder / name}: no photos in it ({', '.join(catalog.PHOTO_SUFFIXES)})"
            )
        names += map(os.fsencode, found)
        labels += [label] * len(found)
    return Photos(folder, np.array(names), np.array(labels), classes, store)


def open_splits(root, store, cache="on", cache_dir=None, cache_gb=None, limit=None):
    """The photos of train and val, decoded once into a cache unless that is off or too large.

    limit: take only so many classes, the first by name.
    """
    splits = [find(root, split, store, limit) for split in ("train", "val")]
    train, val = (split.classes for split in splits)
    unshared = sorted({*train} ^ {*val})
    if unshared:
        raise UserError(
            f"{root}: train has {len(train)} classes, val {len(val)}; in only one of them: "
            f"{some(unshared)}"
        )
    if cache == "on":
        for split in splits:
            split.packed = open_cache(split, root, cache_dir, cache_gb)
    return splits


def open_cache(photos, root, cache_dir, cache_gb):
    """The decoded photos, decoded now if necessary; None if they would be too large."""
    title = f"{photos.folder.name}-{photos.store}"
    name = f"photos-{title}-{cache_key(photos)}"
    folder = data.cache_folder(root, cache_dir, name)
    if not data.is_cached(folder, photos, title, cache_gb):
        return None
    return data.open_packed(folder, len(photos), with_labels=False)


def cache_key(photos):
    """A hash of the folder and of the files' names, sizes and times."""
    facts = hashlib.sha256(os.fsencode(photos.folder.resolve()))
    for name, stat in zip(photos.names.tolist(), photos.stats.tolist()):
        facts.update(b"%s %d %d\n" % (name, *stat))
    return facts.hexdigest()[:16]


def fingerprint(*splits):
    """A hash of the files' names and sizes, but not of their folder."""
    facts = hashlib.sha256()
    for photos in splits:
        for name, size in zip(photos.names.tolist(), photos.stats[:, 0].tolist()):
            facts.update(b"%s %d\n" % (name, size))
    return facts.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# training batches: made on the host by `host_batch`, finished on the device by `device_batch`


@dataclasses.dataclass
class Crops:
    """How a photo is changed on its way into a batch."""

    size: int  # of the batch, (size, size)
    area: tuple = (0.08, 1.0)  # of the window, as a share of the photo's
    colour: float = 0.5  # strength of the photometric change, 0 = none
    mixup: float = 0.0  # Beta(a, a) of a photo's share in its mixture with another; 0 = none
    cutmix: float = 0.0  # Beta(a, a) of its share of the picture's area; 0 = none


def window(rng, height, width, area):
    """A random window (top, left, h, w), in ten tries as torchvision's RandomResizedCrop."""
    for _ in range(10):
        pixels = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(*np.log(ASPECT)))
        h, w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(top), int(left), h, w
    h = min(height, round(width / ASPECT[0]))  # none fits: the middle, cut to ASPECT
    w = min(width, round(height * ASPECT[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def mixture(rng, size, mixup, cutmix):
    """How a photo is mixed with another: its share, and the box (y0, y1, x0, x1) without it.

    mixup (Zhang et al., arXiv 1710.09412) blends all pixels with this share; CutMix (Yun et al.,
    arXiv 1905.04899, eq. 1-2) puts the other one into the box. With both, a coin decides.
    """
    if mixup and not (cutmix and rng.random() < 0.5):
        return rng.beta(mixup, mixup), (0, 0, 0, 0)
    if not cutmix:
        return 1.0, (0, 0, 0, 0)
    half = size * math.sqrt(1 - rng.beta(cutmix, cutmix)) / 2
    middle = rng.uniform(0, size, 2)
    box = [round(min(max(m + d, 0), size)) for m in middle for d in (-half, half)]
    return 1.0, tuple(box)


def host_batch(photos, step, batch_size, seed, a, rows):
    """Batch `step` as it travels: windows cut from the photos, positions in them, labels.

    rows: the slice of the batch that this process works on. Called by augment.Batches.
    """
    items = []
    indices = augment.sample_indices(step, batch_size, len(photos), seed)
    for k in range(batch_size)[rows]:
        rng = np.random.default_rng([seed, 2, step * batch_size + k])  # its place in the stream
        image, label = photos.pair(indices[k])
        top, left, h, w = window(rng, *image.shape[:2], a.area)
        flip = rng.random() < 0.5
        y, _ = augment.source_positions(a.size, a.size / h, 0, False, h)
        x, _ = augment.source_positions(a.size, a.size / w, 0, flip, w)
        colour = augment.colour_matrix(rng, a.colour)
        share, box = mixture(rng, a.size, a.mixup, a.cutmix)
        items.append(
            dict(
                image=image[top : top + h, left : left + w],
                y=y.astype(np.float32),
                x=x.astype(np.float32),
                colour=colour,
                share=np.float32(share),
                box=np.array(box),
                label=label,
            )
        )
    return augment.collate(items)


def device_batch(batch, device, num_classes, mixed=False):
    """Host batch -> normalised images (B, 3, S, S) and the classes' shares (B, K), on `device`.

    mixed: photos are mixed with their neighbours, the first with the second and so on.
    """
    batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    images = augment.normalise(augment.resample(batch), IMAGENET_MEAN, IMAGENET_STD)
    targets = F.one_hot(batch["label"], num_classes).float()
    if mixed:
        at = torch.arange(images.shape[2], device=images.device)
        y0, y1, x0, x1 = batch["box"][:, :, None].unbind(1)  # (B, 1) each
        y, x = (at >= y0) & (at < y1), (at >= x0) & (at < x1)  # (B, S)
        in_box = y[:, None, :, None] & x[:, None, None, :]  # (B, 1, S, S)
        own = batch["share"][:, None, None, None] * ~in_box  # (B, 1, S, S), shares
        images = own * images + (1 - own) * neighbours(images)
        own = own.mean((2, 3))  # (B, 1)
        targets = own * targets + (1 - own) * neighbours(targets)
    return images.contiguous(memory_format=torch.channels_last), targets


def neighbours(x):
    """The rows of x in the order 1, 0, 3, 2, ..."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


# ------------------------------------------------------------------------------------------------
# scoring batches


class Middles(torch.utils.data.Dataset):
    """Item k: the middles of a few photos, uint8 (b, S, S, 3), and their labels (b,).

    Process `rank` of `world` gets every world-th photo. Errors are returned, as by augment.Batches.
    """

    def __init__(self, photos, size, batch_size, rank=0, world=1):
        self.photos, self.size, self.batch_size = photos, size, batch_size
        self.indices = range(rank, len(photos), world)

    def __len__(self):
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, k):
        few = self.indices[k * self.batch_size : (k + 1) * self.batch_size]
        try:
            images = np.stack([centre(self.photos.image(i), self.size) for i in few])
        except UserError as e:
            return e
        labels = self.photos.labels[list(few)]
        return dict(image=torch.from_numpy(images), label=torch.from_numpy(labels))
