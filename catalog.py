"""
Data sets: classes, the one label table, official trees; reading one image and its label.

A data set is its class names, a table from the values in its files to 0..K-1 and IGNORE, and a list
of (stem, image, label) files a split. Nothing after the table knows of void, zero or raw ids.
"""

import dataclasses
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import scenes
from distill import IGNORE
from files import UserError

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
    """NYU Depth v2 in the folder layout: 40 classes (Gupta et al., CVPR 2013), or 13 of them."""
    classes = [(name.replace("_", " "), c) for name, c in zip(NYU40, colours(40))]
    dataset = open_folder(root, "nyuv2", classes)
    if len(dataset.classes) not in (13, 40):
        n = len(dataset.classes)
        raise UserError(f"{root}/classes.txt: {n} classes, NYUv2 has 40 or 13 here")
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
