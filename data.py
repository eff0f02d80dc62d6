"""
Splits of a data set and their decode-once cache; the command that checks and writes data sets.

    python data.py check --dataset camvid --data-dir D     # what is in D, and what is wrong with it
    python data.py scenes --out-dir D                      # the drawn scenes as files
    python data.py download camvid --data-dir D            # or nyuv2, voc2012, ade20k
    python data.py nyuv2 --mat M --splits S --out-dir D    # NYUv2 from its MATLAB files
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import doctor
import prepare
from catalog import DATASETS, in_parallel, read_image, read_pair, resize_image, resize_label
from distill import IGNORE, paper_weights
from files import UserError, as_flag, beside, cli, some
from sources import SOURCES

# ------------------------------------------------------------------------------------------------
# a split: len(), pair(i), image(i), label(i); from a memory map or from the files


class Packed:
    """Decoded pixels, one image after the other, in two flat arrays (memory maps of the cache)."""

    def __init__(self, images, labels, index):
        self.images, self.labels, self.index = images, labels, index  # index: (N, 3) H, W, offset

    def __len__(self):
        return len(self.index)

    def __reduce__(self):
        """Pickled, for worker processes that are no forks: maps are opened again, not copied."""
        if isinstance(self.images, np.memmap):
            folder = Path(self.images.filename).parent
            return open_packed, (folder, len(self), self.labels is not None)
        return Packed, (self.images, self.labels, self.index)

    def pair(self, i):
        return self.image(i), self.label(i)

    def image(self, i):
        h, w, at = self.index[i]
        return self.images[3 * at : 3 * (at + h * w)].reshape(h, w, 3)

    def label(self, i):
        h, w, at = self.index[i]
        return self.labels[at : at + h * w].reshape(h, w)


class Files:
    """The files themselves, decoded at every use; resized to a shorter side if there is one."""

    def __init__(self, pairs, table, short_side=None):
        self.pairs, self.table, self.short_side = pairs, table, short_side

    def __len__(self):
        return len(self.pairs)

    def pair(self, i):
        image, label = read_pair(self.pairs[i], self.table)
        if self.short_side:
            image = resize_image(image, self.short_side)
            label = resize_label(label, image.shape[:2])
        return image, label

    def image(self, i):
        return resize_image(read_image(self.pairs[i][1]), self.short_side)

    def label(self, i):
        return self.pair(i)[1]


class Selection:
    """Images of one or more splits, of which only the first `labelled`, if given, keep labels."""

    def __init__(self, places, labelled=None):
        self.places = places  # [(split, index there)]
        self.labelled = len(places) if labelled is None else labelled

    def __len__(self):
        return len(self.places)

    def pair(self, i):
        split, at = self.places[i]
        image, label = split.pair(at)
        return image, self.shown(i, label)

    def image(self, i):
        split, at = self.places[i]
        return split.image(at)

    def label(self, i):
        split, at = self.places[i]
        return self.shown(i, split.label(at))

    def shown(self, i, label):
        return label if i < self.labelled else np.full_like(label, IGNORE)


def evenly(split, n):
    """n indices of a split, evenly spaced: of a video, the whole of it at a lower frame rate."""
    if not 1 <= n <= len(split):
        flags = "--student-images or --student-labels"
        raise UserError(f"{flags}: {n} images of a split that has {len(split)}")
    return np.linspace(0, len(split) - 1, n).round().astype(int)


def some_of(split):
    """Indices of up to 32 of its images, for estimates."""
    return evenly(split, min(len(split), 32))


def short_side(split):
    """The usual shorter side of a split's images in pixels: the median over some of them."""
    return int(np.median([min(split.image(i).shape[:2]) for i in some_of(split)]))


def subset(split, n):
    return Selection([(split, i) for i in evenly(split, n)])


def few_labels(split, n, others=()):
    """A split with only n of its labels, those of `subset`; then `others`, a split with none."""
    taken = evenly(split, n)
    rest = np.setdiff1d(np.arange(len(split)), taken)
    places = [(split, i) for i in [*taken, *rest]] + [(others, i) for i in range(len(others))]
    return Selection(places, labelled=n)


def open_split(
    dataset, split, data_dir=None, cache="on", cache_dir=None, cache_gb=None, short_side=None
):
    """A split's images and labels, decoded once into a cache unless that is off or too large.

    short_side: if given, images and labels are resized to this shorter side.
    """
    if split not in dataset.pairs:
        raise UserError(f"{dataset.name} has no split '{split}': choose {', '.join(dataset.pairs)}")
    pairs = dataset.pairs[split]
    if dataset.name == "scenes":
        return pack_scenes(pairs, dataset.table)
    files = Files(pairs, dataset.table, short_side)
    if cache == "off":
        return files
    name = f"{dataset.name}-{split}-{cache_key(dataset, pairs, short_side)}"
    folder = cache_folder(data_dir, cache_dir, name)
    if not is_cached(folder, files, f"{dataset.name}/{split}", cache_gb):
        return files
    return open_packed(folder, len(files))


def open_packed(folder, n, with_labels=True):
    """The n images in a folder of the cache; UserError if it is incomplete."""
    names = ("images.bin", "labels.bin")[: 1 + with_labels]
    try:
        index = np.load(folder / "index.npy")
        maps = [np.memmap(folder / name, np.uint8, "r") for name in names]
        pixels = index[:, :2].prod(axis=1).sum()
        whole = len(index) == n and [len(m) for m in maps] == [3 * pixels, pixels][: len(maps)]
        whole = whole and np.array_equal(index, index_of(index[:, :2]))
    except (OSError, ValueError, EOFError, IndexError) as e:
        if isinstance(e, OSError) and e.errno == errno.ENOMEM:
            raise UserError(f"{folder}: too large for this process's memory limit") from e
        whole = False
    if not whole:
        raise UserError(f"{folder}: a damaged cache; remove this folder, and it is rebuilt")
    images, labels = (*maps, None)[:2]
    return Packed(images, labels, index)


def is_cached(folder, split, title, cache_gb):
    """Whether a folder of the cache holds a split, which is decoded into it now if necessary.

    False if that would take more than --cache-gb, by default half of the free space.
    """
    remove_stale_builds(folder.parent)
    if folder.is_dir():
        return True
    bytes_each = np.mean([sum(part.nbytes for part in split.pair(i)) for i in some_of(split)])
    need = bytes_each * len(split) / 1e9
    limit = shutil.disk_usage(folder.parent).free / 2 / 1e9 if cache_gb is None else cache_gb
    if need > limit:
        print(
            f"{title}: about {need:.1f} GB decoded, more than --cache-gb {limit:.1f}: no cache, "
            "the files are read by worker processes"
        )
        return False
    build_cache(folder, split, title)
    alike = folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*")
    others = [other.name for other in alike if other != folder and other.suffix == ""]
    if others:
        print(f"  beside it, of other files or settings: {some(others, 2)}")
    return True


def remove_stale_builds(home):
    """Remove the folders of killed builds: those untouched for ten minutes."""
    for tmp in home.iterdir():
        if not re.fullmatch(r".+-[0-9a-f]{16}\.tmp[0-9a-f]+", tmp.name):
            continue
        with contextlib.suppress(OSError):  # finished just now, by another process
            if time.time() - tmp.stat().st_mtime > 600:
                shutil.rmtree(tmp)


def pack_scenes(pairs, table):
    """The scenes, in memory: they are drawn faster than a cache is read from a cold disk."""
    drawn = [read_pair(i, table) for i in pairs]
    images = np.concatenate([image.reshape(-1) for image, _ in drawn])
    labels = np.concatenate([label.reshape(-1) for _, label in drawn])
    sizes = np.array([label.shape for _, label in drawn])
    return Packed(images, labels, index_of(sizes))


def index_of(sizes):
    """(N, 2) heights and widths -> (N, 3) with the offset of each image's first pixel."""
    sizes = np.asarray(sizes, np.int64)
    ends = np.cumsum(sizes.prod(1))
    return np.column_stack([sizes, np.concatenate([[0], ends[:-1]])])


def check_cache(args):
    """UserError for flags of the cache together with --cache off."""
    for name in ("cache_dir", "cache_gb"):
        if args.cache == "off" and getattr(args, name, None) is not None:
            raise UserError(f"{as_flag(name)} has no effect with --cache off")


def cache_folder(data_dir, cache_dir, name):
    """The folder of the cache `name`, built or not: in --cache-dir, or .cache beside the data, or,
    where that is read-only and has not got it yet, the user's own cache.
    """
    home = Path.home() / ".cache" / "segmentation-student"
    for folder in [Path(cache_dir)] if cache_dir else [Path(data_dir) / ".cache", home]:
        if (folder / name).is_dir():
            return folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder / name
        except OSError:
            continue
    raise UserError(
        f"{folder}: cannot keep a cache there; pass another --cache-dir, or --cache off"
    )


def cache_key(dataset, pairs, short_side=None):
    """A hash of the files' names, sizes and times, of the label table and the shorter side."""
    resized = [f"{short_side}, the longer rounded down"] if short_side else []
    facts = [dataset.table.tobytes().hex(), *resized]
    for _, *paths in pairs:
        for path in filter(None, paths):
            stat = path.stat()
            facts.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def build_cache(folder, split, title):
    """Decode a split, in parallel, into a folder that gets its name when complete."""
    tmp = Path(beside(folder))
    try:
        tmp.mkdir()
        np.save(tmp / "index.npy", index_of(decode(split, tmp, title)))
        try:
            os.rename(tmp, folder)
            print(f"cache {title}: {len(split)} images in {folder}", flush=True)
        except OSError:
            if not folder.is_dir():  # if it is, another process was faster: use its result
                raise
    except OSError as e:
        raise UserError(f"{folder}: cannot build the cache ({e.strerror or e})") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def decode(split, folder, title):
    """Write all images to images.bin and labels to labels.bin, in order; returns their sizes."""
    sizes = []
    with open(folder / "images.bin", "wb") as images, open(folder / "labels.bin", "wb") as labels:
        for image, label in in_parallel(split.pair, range(len(split)), f"cache {title}"):
            images.write(image.tobytes())
            labels.write(label.tobytes())
            sizes.append(image.shape[:2])
            os.utime(folder)  # shows that this build is not stale
    return sizes


def fingerprint(dataset, splits):
    """A hash of the label table and the files' stems and sizes, but not of their folder."""
    facts = hashlib.sha256(dataset.table.tobytes())
    for pair in [pair for split in splits for pair in dataset.pairs[split]]:
        stem, *paths = [pair] if isinstance(pair, int) else pair
        facts.update(json.dumps([stem, *(p.stat().st_size for p in paths if p)]).encode())
    return facts.hexdigest()[:16]


def check_labels(split, classes, whose):
    """UserError if all labels are void, and a warning if they have one class only.

    All labels are read only if a sample of them shows one class at most.
    """
    pixels = sum(np.bincount(split.label(i).ravel(), minlength=256) for i in some_of(split))
    if np.count_nonzero(pixels[:IGNORE]) < 2:
        pixels = class_pixels(split)
    found = np.flatnonzero(pixels[:IGNORE])
    see = "what `python data.py check` says of them"
    if not len(found):
        raise UserError(f"the labels of the {whose} are void all over: of no use; see {see}")
    if len(found) == 1:  # perhaps masks of 0 and 255
        print(
            f"!!! the labels of the {whose} know one class only, '{classes[found[0]]}': see {see}"
        )


def class_pixels(split):
    """(256,) int64: pixels of each class, and of IGNORE at 255, over a split's images."""

    def count(i):
        return np.bincount(split.label(i).ravel(), minlength=256)

    return sum(in_parallel(count, range(len(split)), "pixels of each class"))


def class_weights(split, num_classes):
    """(K,) class weights by TransKD's formula. (Its release has constants, of Cityscapes.)"""
    return paper_weights(torch.from_numpy(class_pixels(split)[:num_classes]))


# ------------------------------------------------------------------------------------------------
# the command


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Check, write or download a data set", allow_abbrev=False
    )
    sub = parser.add_subparsers(required=True, metavar="{check,scenes,download,nyuv2}")
    p = sub.add_parser("check", help="read every file of a data set and say what is wrong with it")
    p.add_argument("--dataset", default="folder", help=f"one of {', '.join(DATASETS)}")
    p.add_argument("--data-dir", help="the folder that holds it (default: data/NAME)")
    p.set_defaults(run=doctor.check)
    p = sub.add_parser(
        "scenes", help="write the drawn street scenes as files, in the folder layout"
    )
    p.add_argument("--out-dir", required=True, help="a new folder")
    p.add_argument("--count", type=int, default=100, help="scenes per split, at most")
    p.set_defaults(run=prepare.export_scenes)
    p = sub.add_parser("download", help="fetch a data set, or say how to get it")
    p.add_argument("name", help=f"one of {', '.join(SOURCES)}")
    p.add_argument(
        "--data-dir", required=True, help="where it goes; interrupted downloads resume there"
    )
    p.add_argument(
        "--keep-archive",
        action="store_true",
        help="keep the fetched files, to unpack or convert them again (default: removed)",
    )
    p.set_defaults(run=prepare.download)
    p = sub.add_parser("nyuv2", help="convert NYUv2's MATLAB files to the folder layout")
    p.add_argument("--mat", required=True, help="nyu_depth_v2_labeled.mat, 3 GB, read in parts")
    p.add_argument("--splits", required=True, help="splits.mat: the official 795 train, 654 test")
    p.add_argument("--map", help="a classMapping40.mat of your own (default: the usual one)")
    p.add_argument(
        "--classes",
        type=int,
        choices=(40, 13),
        default=40,
        help="40, as in most papers, or their 13 groups, which others score",
    )
    p.add_argument("--out-dir", required=True, help="existing pictures in it are kept")
    p.set_defaults(run=prepare.convert_nyuv2)
    return parser.parse_args(argv)


def main(args):
    args.run(args)


if __name__ == "__main__":
    cli(main, get_args())
