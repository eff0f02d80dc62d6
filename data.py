"""
Data sets, the one label table, the decode-once cache, and a doctor for labels.

    python data.py check --dataset camvid --data-dir D     # what is in D, and what is wrong with it
    python data.py scenes --out-dir D                      # the drawn scenes as files

A data set is its class names, a table from the values in its files to 0..K-1 and IGNORE, and a list
of (stem, image, label) files a split. Nothing after the table knows of void, zero or raw ids.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import scenes
from distill import IGNORE
from model import UserError, cli

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

CAMVID = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign symbol", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)
NYU40 = """wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk
shelves curtain dresser pillow mirror floor_mat clothes ceiling books refrigerator television paper
towel shower_curtain box whiteboard person night_stand toilet sink lamp bathtub bag otherstructure
otherfurniture otherprop""".split()

# ------------------------------------------------------------------------------------------------
# what a data set is


@dataclasses.dataclass
class Dataset:
    name: str
    classes: tuple  # K names
    palette: tuple  # K (r, g, b)
    table: np.ndarray  # (256,) int16: value in a file -> 0..K-1, IGNORE, or -1 (not allowed)
    pairs: dict  # split -> [(stem, image path, label path)], or, for scenes, [index]


def colours(n):
    """n distinct colours: the bits of the class number dealt out to r, g, b, as PASCAL VOC does."""
    bits = [[(c >> (3 * i + k)) & 1 for i in range(3)] for c in range(1, n + 1) for k in range(3)]
    return tuple(
        tuple(sum(b << (7 - i) for i, b in enumerate(bits[3 * c + k])) for k in range(3))
        for c in range(n)
    )


def label_table(num_classes, ignored=()):
    table = np.full(256, -1, np.int16)
    table[:num_classes] = np.arange(num_classes)
    table[list(ignored)] = IGNORE
    return table


def open_dataset(name, data_dir=None):
    """A Dataset by name, of DATASETS. Raises UserError if its files are not as they should be."""
    if name not in DATASETS:
        raise UserError(f"unknown dataset '{name}': choose one of {', '.join(DATASETS)}")
    if name == "scenes":
        return open_scenes()
    if not data_dir:
        raise UserError(f"--dataset {name} needs --data-dir, the folder that holds it")
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: no such folder")
    dataset = DATASETS[name](root)
    for split, pairs in dataset.pairs.items():
        if not pairs:
            raise UserError(f"{root}: the {split} split is empty")
    return dataset


def check_classes(ckpt, net, dataset):
    if net.num_classes != len(dataset.classes):
        n = len(dataset.classes)
        raise UserError(f"{ckpt} predicts {net.num_classes} classes, {dataset.name} has {n}")


def open_scenes():
    names, palette = zip(*scenes.CLASSES)
    pairs = {split: list(range(a, a + n)) for split, (a, n) in scenes.SPLITS.items()}
    return Dataset("scenes", names, palette, label_table(len(names), [IGNORE]), pairs)


def open_camvid(root):
    """The SegNet layout: train/ trainannot/ val/ valannot/, and test/ testannot/ if there."""
    pairs = {}
    for split in ("train", "val", "test"):
        if split == "test" and not (root / split).is_dir():
            continue
        images, labels = files_in(root / split), files_in(root / f"{split}annot", (".png",))
        pairs[split] = pair_up(images, labels, sorted(images.keys() | labels.keys()), root / split)
    names, palette = zip(*CAMVID)
    return Dataset("camvid", names, palette, label_table(11, [11, IGNORE]), pairs)


def open_folder(root, name="folder", classes=None):
    """images/STEM.jpg|png, labels/STEM.png, train.txt, val.txt, and perhaps classes.txt."""
    images, labels = files_in(root / "images"), files_in(root / "labels", (".png",))
    pairs = {}
    for split in ("train", "val", "test"):
        path = root / f"{split}.txt"
        if split == "test" and not path.exists():
            continue
        stems = read_lines(path)
        pairs[split] = pair_up(images, labels, stems, path)
    if (root / "classes.txt").exists():
        classes = read_classes(root / "classes.txt")
    elif classes is None:
        classes = count_classes([pair[2] for split in pairs.values() for pair in split], root)
    names, palette = zip(*classes)
    return Dataset(name, names, palette, label_table(len(names), [IGNORE]), pairs)


def open_nyuv2(root):
    """NYU Depth v2 in the folder layout, with the 40 classes of Gupta et al. (CVPR 2013)."""
    classes = [(name.replace("_", " "), c) for name, c in zip(NYU40, colours(40))]
    dataset = open_folder(root, "nyuv2", classes)
    if len(dataset.classes) != 40:
        raise UserError(f"{root}/classes.txt: {len(dataset.classes)} classes, NYUv2 has 40 here")
    return dataset


DATASETS = {"scenes": None, "folder": open_folder, "camvid": open_camvid, "nyuv2": open_nyuv2}


def read_lines(path):
    try:
        return [
            line.strip()
            for line in path.read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (it lists the split's stems, one a line)") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None


def read_classes(path):
    classes, lines = [], read_lines(path)
    if not 1 <= len(lines) <= 255:
        raise UserError(f"{path}: {len(lines)} classes, 1 to 255 are possible (255 = ignore)")
    for line, colour in zip(lines, colours(len(lines))):
        words = line.replace(",", " ").split()
        if len(words) > 3 and all(w.isdigit() and int(w) < 256 for w in words[-3:]):
            classes.append((" ".join(words[:-3]), tuple(int(w) for w in words[-3:])))
        else:
            classes.append((line, colour))
    return classes


def count_classes(paths, root):
    """Without classes.txt: as many classes as the largest label says, with numbers for names."""
    print(f"{root}/classes.txt is not there: reading {len(paths)} labels to count the classes")

    def largest(path):
        return max([-1, *set(np.unique(read_label(path)).tolist()) - {IGNORE}])

    n = max(in_parallel(largest, paths, "counting classes"), default=-1) + 1
    if n == 0:
        raise UserError(
            f"{root}/labels: every pixel is {IGNORE} (ignore), there is no class to learn"
        )
    return [(f"class {i}", colour) for i, colour in enumerate(colours(n))]


def files_in(folder, suffixes=IMAGE_SUFFIXES):
    """stem -> path of the images in a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in suffixes}


def pair_up(images, labels, stems, source):
    for what, found in (("image", images), ("label", labels)):
        missing = [s for s in stems if s not in found]
        if missing:
            some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            raise UserError(f"{source}: {len(missing)} of {len(stems)} have no {what}: {some}")
    return [(s, images[s], labels[s]) for s in stems]


# ------------------------------------------------------------------------------------------------
# reading files


def open_image(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
        return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning) as e:
        raise UserError(f"{path}: cannot be read as an image ({e})") from e
    except Image.DecompressionBombError as e:
        raise UserError(f"{path}: refused, too large to be an image ({e})") from e


def read_image(path):
    """(H, W, 3) uint8, upright whatever the camera's EXIF orientation."""
    image = open_image(path)
    if image.mode[0] in "IF":
        raise UserError(f"{path}: mode {image.mode}; photos must have 8 bits a channel")
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def read_label(path):
    """(H, W) uint8: the values in the file; of a palette image its indices."""
    label = np.asarray(open_image(path))
    if label.ndim != 2:
        raise UserError(
            f"{path}: a label must have one channel of class ids, this one has {label.shape[2]} "
            "(a picture in the colours of the classes? convert it to ids first)"
        )
    if label.dtype.kind == "f":
        raise UserError(f"{path}: floating point values, a label has whole class ids")
    if label.dtype == bool or label.max(initial=0) <= 255 and label.min(initial=0) >= 0:
        return label.astype(np.uint8)
    raise UserError(f"{path}: values up to {label.max()}, a label has class ids up to 255")


def map_label(raw, table, path):
    """Apply the table; a value it does not allow is an error that names the file and the values."""
    label = table[raw]
    if label.min(initial=0) < 0:
        found = sorted(int(v) for v in np.unique(raw) if table[v] < 0)
        allowed = np.flatnonzero(table >= 0)
        runs = np.split(allowed, np.flatnonzero(np.diff(allowed) > 1) + 1)
        runs = ", ".join(f"{r[0]}" if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)
        raise UserError(
            f"{path}: label values {', '.join(map(str, found[:10]))} are not classes of this data "
            f"set; allowed are {runs}"
        )
    return label.astype(np.uint8)


def read_pair(pair, table):
    """Image (H, W, 3) and train-id label (H, W) of one entry of Dataset.pairs."""
    if isinstance(pair, int):
        return scenes.draw(pair)
    _, image_path, label_path = pair
    image, label = read_image(image_path), read_label(label_path)
    if image.shape[:2] != label.shape:
        (h, w), (lh, lw) = image.shape[:2], label.shape
        turned = (
            " (rotated? the image's EXIF orientation is respected)" if (h, w) == (lw, lh) else ""
        )
        raise UserError(f"{label_path}: {lw}x{lh}, but its image {image_path} is {w}x{h}{turned}")
    if min(label.shape) < 32:
        raise UserError(f"{image_path}: {label.shape[1]}x{label.shape[0]}, 32x32 is the smallest")
    return image, map_label(label, table, label_path)


# ------------------------------------------------------------------------------------------------
# a split: len(), image(i), label(i); from a memory map or from the files


class Packed:
    """Decoded pixels, one image after the other, in two flat arrays (memory maps of the cache)."""

    def __init__(self, images, labels, index):
        self.images, self.labels, self.index = images, labels, index  # index: (N, 3) H, W, offset

    def __len__(self):
        return len(self.index)

    def pair(self, i):
        return self.image(i), self.label(i)

    def image(self, i):
        h, w, at = self.index[i]
        return self.images[3 * at : 3 * (at + h * w)].reshape(h, w, 3)

    def label(self, i):
        h, w, at = self.index[i]
        return self.labels[at : at + h * w].reshape(h, w)


class Files:
    """The files themselves, decoded at every use."""

    def __init__(self, pairs, table):
        self.pairs, self.table = pairs, table

    def __len__(self):
        return len(self.pairs)

    def pair(self, i):
        return read_pair(self.pairs[i], self.table)

    def image(self, i):
        pair = self.pairs[i]
        return scenes.draw(pair)[0] if isinstance(pair, int) else read_image(pair[1])

    def label(self, i):
        return self.pair(i)[1]


class Subset:
    """n of a split's images, evenly spaced: of a video, the whole of it at a lower frame rate."""

    def __init__(self, split, n):
        if not 1 <= n <= len(split):
            raise UserError(f"{n} images of a split that has {len(split)}")
        self.split, self.indices = split, np.linspace(0, len(split) - 1, n).round().astype(int)

    def __len__(self):
        return len(self.indices)

    def pair(self, i):
        return self.split.pair(self.indices[i])

    def image(self, i):
        return self.split.image(self.indices[i])

    def label(self, i):
        return self.split.label(self.indices[i])


def open_split(dataset, split, data_dir=None, cache="on", cache_dir=None, cache_gb=None):
    """A split's images and labels, decoded once into a cache unless that is off or too large."""
    if split not in dataset.pairs:
        raise UserError(f"{dataset.name} has no split '{split}': choose {', '.join(dataset.pairs)}")
    pairs = dataset.pairs[split]
    if dataset.name == "scenes":
        return pack_scenes(pairs, dataset.table)
    files = Files(pairs, dataset.table)
    if cache == "off":
        return files
    folder = (
        cache_folder(data_dir, cache_dir) / f"{dataset.name}-{split}-{cache_key(dataset, pairs)}"
    )
    if not folder.is_dir():
        need = sum(files.label(i).size for i in range(min(len(files), 8))) / min(len(files), 8)
        need, limit = need * 4 * len(files), cache_gb
        if limit is None:
            limit = shutil.disk_usage(folder.parent).free / 2 / 1e9
        if need / 1e9 > limit:
            print(
                f"{dataset.name}/{split}: about {need / 1e9:.1f} GB decoded, more than --cache-gb "
                f"{limit:.1f}: no cache, the files are read by worker processes"
            )
            return files
        build_cache(folder, files, f"{dataset.name}/{split}")
    return Packed(
        np.memmap(folder / "images.bin", np.uint8, "r"),
        np.memmap(folder / "labels.bin", np.uint8, "r"),
        np.load(folder / "index.npy"),
    )


def pack_scenes(pairs, table):
    """Scenes are drawn faster than a cache is read from a cold disk: they stay in memory."""
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


def cache_folder(data_dir, cache_dir):
    """--cache-dir, or .cache beside the data, or, where that is read-only, the user's own cache."""
    home = Path.home() / ".cache" / "segmentation-student"
    for folder in [Path(cache_dir)] if cache_dir else [Path(data_dir) / ".cache", home]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise UserError(
        f"{folder}: cannot keep a cache there; pass another --cache-dir, or --cache off"
    )


def cache_key(dataset, pairs):
    """Changes with any file's name, size or time, and with the label table."""
    facts = [dataset.table.tobytes().hex()]
    for _, *paths in pairs:
        for path in paths:
            stat = path.stat()
            facts.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def build_cache(folder, files, title):
    """Decode all files, in parallel, into a folder that gets its name when it is complete."""
    tmp = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    for old in folder.parent.glob(f"{folder.name}.tmp*"):
        if time.time() - old.stat().st_mtime > 600:  # nobody works on it: a build that was killed
            shutil.rmtree(old, ignore_errors=True)
    try:
        tmp.mkdir()
        np.save(tmp / "index.npy", index_of(decode(files, tmp, title)))
        try:
            os.rename(tmp, folder)
            print(f"cache {title}: {len(files)} images in {folder}", flush=True)
        except OSError:
            if not folder.is_dir():  # if it is, another process was faster: use its result
                raise
    except OSError as e:
        raise UserError(f"{folder}: cannot build the cache ({e.strerror or e})") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def decode(files, folder, title):
    """Append every image and label to images.bin and labels.bin, in order; returns their sizes."""
    sizes = []
    with open(folder / "images.bin", "wb") as images, open(folder / "labels.bin", "wb") as labels:
        for image, label in in_parallel(files.pair, range(len(files)), f"cache {title}"):
            images.write(image.tobytes())
            labels.write(label.tobytes())
            sizes.append(label.shape)
            os.utime(folder)  # still alive
    return sizes


def in_parallel(work, items, title):
    """work(item) of all items, by threads and in order, telling now and then how far it is."""
    start = told = time.time()
    with ThreadPoolExecutor() as pool:
        for done in range(0, len(items), 32):  # a few at a time: memory stays small
            now = time.time()
            if done and now - told > 2:
                left = (now - start) * (len(items) / done - 1)
                print(f"{title}: {done}/{len(items)}, {left:.0f} s left", flush=True)
                told = now
            yield from pool.map(work, items[done : done + 32])


def class_pixels(split):
    """(256,) int64: pixels of each class, and of IGNORE at 255, over a split."""
    return sum(np.bincount(split.label(i).ravel(), minlength=256) for i in range(len(split)))


# ------------------------------------------------------------------------------------------------
# the label doctor


def examine(pair, table):
    """One pair of files: (size or None, raw values' counts, what is wrong or None)."""
    counts = np.zeros(256, np.int64)
    try:
        if not isinstance(pair, int):
            counts = np.bincount(read_label(pair[2]).ravel(), minlength=256)
        image, label = read_pair(pair, table)
        if isinstance(pair, int):
            counts = np.bincount(label.ravel(), minlength=256)
        return image.shape[:2], counts, None
    except UserError as e:
        return None, counts, str(e)


def likely_mistake(counts, num_classes):
    """Words for what the histogram of raw values looks like, or None."""
    values = [v for v in np.flatnonzero(counts) if v != IGNORE]
    if not values:
        return f"every pixel is {IGNORE}: nothing can be learnt from these labels"
    if values[-1] == num_classes and values[0] == 1:
        return (
            f"labels run from 1 to {num_classes}: shifted by one? Ids start at 0 (void is {IGNORE})"
        )
    if values[0] == 0 and values[-1] == num_classes:
        return f"labels run from 0 to {num_classes}, one too many: is 0 void? Void is {IGNORE} here"
    if num_classes == 19 and 19 < values[-1] <= 33:
        return "these look like raw Cityscapes ids (0 to 33), not the 19 train ids"
    if len(values) > 2 * num_classes and values[-1] > num_classes:
        return "values all over 0..255: labels resized with interpolation, or a photo?"
    return None


def check(args):
    """python data.py check: sizes, histogram and every bad file; UserError if there are any."""
    dataset = open_dataset(args.dataset, args.data_dir)
    problems = []
    for split, pairs in dataset.pairs.items():
        found = list(in_parallel(lambda p: examine(p, dataset.table), pairs, f"check {split}"))
        counts = sum(counts for _, counts, _ in found)
        sizes = sorted({size for size, _, _ in found if size})
        some = ", ".join(f"{w}x{h}" for h, w in sizes[:4]) + (" ..." if len(sizes) > 4 else "")
        print(f"{split}: {len(pairs)} images, {len(sizes)} size(s): {some or 'none readable'}")
        wrong = [message for _, _, message in found if message]
        print("\n".join(wrong[:10] + ["..."] * (len(wrong) > 10)) or "  every pair is readable")
        problems += wrong
        mistake = likely_mistake(counts, len(dataset.classes))
        if mistake:
            print(f"  likely: {mistake}")
            problems.append(mistake)
        mapped = np.zeros(256, np.int64)
        np.add.at(mapped, dataset.table[dataset.table >= 0], counts[dataset.table >= 0])
        total = max(int(counts.sum()), 1)
        for k, name in [*enumerate(dataset.classes), (IGNORE, "(ignored)")]:
            print(f"  {k:3d} {name:20s} {100 * mapped[k] / total:6.2f} %  {mapped[k]:>12d} px")
    both = set(dataset.pairs["train"]) & set(dataset.pairs["val"])
    if both:
        problems.append(f"{len(both)} images are in train and in val: {sorted(both)[0][0]} ...")
        print(problems[-1])
    if args.dataset != "scenes":
        report_spare_files(Path(args.data_dir), dataset)
    if problems:
        raise UserError(f"{len(problems)} problem(s) in {args.data_dir}; the first: {problems[0]}")
    print("no problem found")


def report_spare_files(root, dataset):
    """Files of the folder layout that train.txt, val.txt and test.txt do not name."""
    named = {pair[0] for pairs in dataset.pairs.values() for pair in pairs}
    for folder in ("images", "labels"):
        spare = sorted(files_in(root / folder).keys() - named) if (root / folder).is_dir() else []
        if spare:
            some = ", ".join(spare[:5]) + " ..." * (len(spare) > 5)
            print(f"{len(spare)} files in {folder}/ are in no split: {some}")


def export_scenes(args):
    """python data.py scenes: the drawn scenes as files, an example of the folder layout."""
    root = Path(args.out_dir)
    if args.count < 1:
        raise UserError("--count must be at least 1")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root}: not empty; pass a new folder as --out-dir")
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    lines = [f"{name} {r} {g} {b}" for name, (r, g, b) in scenes.CLASSES]
    (root / "classes.txt").write_text("\n".join(lines) + "\n")
    for split, (first, n) in scenes.SPLITS.items():
        stems = [f"{i:07d}" for i in range(first, first + min(n, args.count))]
        for stem in stems:
            image, label = scenes.draw(int(stem))
            Image.fromarray(image).save(root / "images" / f"{stem}.png")
            Image.fromarray(label).save(root / "labels" / f"{stem}.png")
        (root / f"{split}.txt").write_text("\n".join(stems) + "\n")
    print(f"{root}: written, in the layout of --dataset folder")


def get_args():
    parser = argparse.ArgumentParser(
        description="Look at a data set, or write one", allow_abbrev=False
    )
    sub = parser.add_subparsers(required=True, metavar="{check,scenes}")
    p = sub.add_parser("check", help="read every file of a data set and say what is wrong with it")
    p.add_argument("--dataset", default="folder", help=f"one of {', '.join(DATASETS)}")
    p.add_argument("--data-dir", help="the folder that holds it")
    p.set_defaults(run=check)
    p = sub.add_parser(
        "scenes", help="write the drawn street scenes as files, in the folder layout"
    )
    p.add_argument("--out-dir", required=True, help="a new folder")
    p.add_argument("--count", type=int, default=100, help="scenes a split, at most")
    p.set_defaults(run=export_scenes)
    return parser.parse_args()


if __name__ == "__main__":
    args = get_args()
    cli(args.run, args)
