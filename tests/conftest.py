"""Small data sets in the layouts of the real ones, made anew for each test."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network that may not be there
torch.set_num_threads(1)  # for nets this small more threads only wait for each other

COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)], np.uint8)


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns, backward included."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def picture(seed, height=40, width=48, classes=3):
    """A label of rectangles and an image whose colour is its label's."""
    rng = np.random.default_rng(seed)
    label = np.zeros((height, width), np.uint8)
    for _ in range(6):
        y, x = rng.integers(0, height - 8), rng.integers(0, width - 8)
        label[y : y + rng.integers(4, 20), x : x + rng.integers(4, 20)] = rng.integers(classes)
    return COLOURS[label % 3], label


def write_folder(root, train=6, val=3, classes=3, **kw):
    """The folder layout, with one column of ignored pixels in every label."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    stems = [f"p{i}" for i in range(train + val)]
    for i, stem in enumerate(stems):
        image, label = picture(i, classes=classes, **kw)
        label[:, 0] = 255
        Image.fromarray(image).save(root / "images" / f"{stem}.png")
        Image.fromarray(label).save(root / "labels" / f"{stem}.png")
    (root / "train.txt").write_text("\n".join(stems[:train]) + "\n")
    (root / "val.txt").write_text("\n".join(stems[train:]) + "\n")
    (root / "classes.txt").write_text("".join(f"thing {k}\n" for k in range(classes)))
    return root


def write_photos(root, train=6, val=2, classes=3):
    """A class a colour, photos of many sizes: root/train/CLASS/*, root/val/CLASS/*."""
    rng = np.random.default_rng(0)
    suffixes = ("jpg", "png", "webp", "JPEG")
    for split, count in (("train", train), ("val", val)):
        for k in range(classes):
            place = root / split / f"thing{k}"
            place.mkdir(parents=True)
            for i in range(count):
                size = (*rng.integers(33, 70, 2), 3)
                pixels = (COLOURS[k % 3] + rng.normal(0, 30, size)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.{suffixes[i % 4]}")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")
