"""
Data sets: classes, label tables, official trees; reading one image and its label.

A data set is its class names, a table from the values in its files to 0..K-1 and IGNORE, and one
list of (stem, image, label) files per split. Past the table nothing knows of void, zero or raw ids.
"""

import dataclasses
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import scenes
from classes import ADE20K, CAMVID, CITYSCAPES, COCO_STUFF, COCO_STUFF_UNUSED, NYU40, VOC
from distill import IGNORE
from files import Progress, UserError, some
from sources import SOURCES, how_to_get

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
PHOTO_SUFFIXES = (*IMAGE_SUFFIXES, ".webp", ".bmp", ".tif", ".tiff")  # of photos in a folder
ORIENTATION = 0x0112  # the EXIF tag

# ------------------------------------------------------------------------------------------------
# a data set


class Missing(UserError):
    """A file or folder that the layout requires is missing."""


@dataclasses.dataclass
class Dataset:
    name: str
    classes: tuple  # K names
    palette: tuple  # K (r, g, b)
    table: np.ndarray  # (256,) int16: value in a file -> 0..K-1, IGNORE, or -1 (not allowed)
    # split -> [(stem, image path, label path or None where labels are withheld)]; of scenes [index]
    pairs: dict
    ids: tuple | None = None  # K values that --save-preds writes, if not 0..K-1
    in_parts: bool = False  # whether the stems' first folders are also scored separately

    def __post_init__(self):
        values = self.table[self.table != IGNORE].max() + 1
        if not len(self.classes) == len(self.palette) == values:
            counts = f"{len(self.classes)} names, {len(self.palette)} colours"
            raise UserError(f"{self.name}: {counts}, {values} label values: should be as many")

    def parts_of(self, split):
        """The part that each image of a split belongs to; None if the data set has no parts."""
        return [stem.split("/")[0] for stem, *_ in self.pairs[split]] if self.in_parts else None


def colours(n):
    """n distinct colours: the bits of the class number dealt out to r, g, b, as PASCAL VOC does."""
    palette = []
    for c in range(1, n + 1):
        rgb = [0, 0, 0]
        for i in range(3):
            for k in range(3):
                rgb[k] |= ((c >> (3 * i + k)) & 1) << (7 - i)
        palette.append(tuple(rgb))
    return tuple(palette)


VOC_COLOURS = ((0, 0, 0), *colours(20))


def label_table(ids, ignored=()):
    """A Dataset's table. ids: the classes' values, or how many if 0, 1, ...; ignored: void's."""
    table = np.full(256, -1, np.int16)
    ids = range(ids) if isinstance(ids, int) else ids
    table[[*ignored, IGNORE]] = IGNORE
    table[list(ids)] = np.arange(len(ids))
    return table


def folder_of(name, data_dir=None):
    """Where a data set is: --data-dir, by default data/NAME. None of scenes, which are drawn."""
    if name not in DATASETS:
        raise UserError(f"unknown dataset '{name}': choose one of {', '.join(DATASETS)}")
    if name == "folder" and not data_dir:
        raise UserError("--dataset folder needs --data-dir, the folder that holds it")
    return data_dir or (None if name == "scenes" else f"data/{name}")


def open_dataset(name, data_dir=None, **options):
    """A Dataset by its name in DATASETS. Raises UserError if its files are not as expected."""
    folder = folder_of(name, data_dir)
    if name == "scenes":
        return open_scenes()
    root = Path(folder)
    hint = f"; {how_to_get(name, root)}" if name in SOURCES else ""
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: no such folder{hint}")
    try:
        dataset = DATASETS[name](root, **options)
    except Missing as e:
        raise UserError(f"{e}{hint}") from e
    for split, pairs in dataset.pairs.items():
        if not pairs:
            raise UserError(f"{root}: the {split} split is empty")
    return dataset


def check_classes(ckpt, net, facts, dataset):
    """UserError if a checkpoint's classes differ from the data set's in number or order.

    A name that the data set does not have may be another spelling: that is only a warning.
    """
    n = net.num_classes - (facts["void"] is not None)
    if n != len(dataset.classes):
        raise UserError(f"{ckpt} predicts {n} classes, {dataset.name} has {len(dataset.classes)}")
    theirs, ours = facts["classes"] or dataset.classes, dataset.classes
    plain = [[letters(name) or name for name in names] for names in (theirs, ours)]
    other = [k for k in range(n) if plain[0][k] != plain[1][k]]
    if other:
        k = other[0]
        example = f"its class {k} is '{theirs[k]}', that of {dataset.name} '{ours[k]}'"
        if {plain[0][k] for k in other} & {*plain[1]}:
            raise UserError(f"{ckpt} has other classes, or in another order: {example}")
        print(
            f"!!! {ckpt}: {len(other)} of {n} classes have other names: {example}. Are they these?"
        )


def letters(name):
    """A name without case, spaces and punctuation, in any alphabet."""
    return re.sub(r"[\W_]+", "", one_form(name).casefold())


def complete(facts, num_classes, dataset=None):
    """facts, with class names and colours added where somebody else's checkpoint has none."""
    n = num_classes - (facts["void"] is not None)
    by_count = {19: [(name, colour) for name, _, colour in CITYSCAPES], 150: with_colours(ADE20K)}
    by_count[21] = list(zip(VOC, VOC_COLOURS))
    if dataset:
        names, palette = dataset.classes, dataset.palette
    else:
        names, palette = zip(*by_count.get(n) or with_colours([f"class {k}" for k in range(n)]))
    names, palette = facts["classes"] or list(names), facts["palette"] or [list(c) for c in palette]
    return facts | dict(classes=names, palette=palette)


def with_colours(names):
    return list(zip(names, colours(len(names))))


def open_scenes():
    names, palette = zip(*scenes.CLASSES)
    pairs = {split: list(range(a, a + n)) for split, (a, n) in scenes.SPLITS.items()}
    return Dataset("scenes", names, palette, label_table(len(names)), pairs)


def open_camvid(root):
    """The SegNet layout: train/ trainannot/ val/ valannot/, and test/ testannot/ if present."""
    pairs = {}
    for split in ("train", "val", "test"):
        if split == "test" and not (root / split).is_dir():
            continue
        images, labels = files_in(root / split), files_in(root / f"{split}annot", (".png",))
        pairs[split] = pair_up(images, labels, sorted(images.keys() | labels.keys()), root / split)
    names, palette = zip(*CAMVID)
    return Dataset("camvid", names, palette, label_table(11, [11]), pairs)


def open_folder(root, name="folder", classes=None):
    """images/STEM.jpg (or another of PHOTO_SUFFIXES), labels/STEM.png, train.txt, val.txt;
    optional: test.txt, classes.txt, and unlabelled.txt, the stems of images without labels.
    """
    images = files_in(root / "images", PHOTO_SUFFIXES)
    labels = files_in(root / "labels", (".png",))
    pairs = {}
    for split in ("train", "val", "test"):
        path = root / f"{split}.txt"
        if split == "test" and not path.exists():
            continue
        stems = read_lines(path)
        pairs[split] = pair_up(images, labels, stems, path)
    labelled = [pair[2] for split in pairs.values() for pair in split]
    if (path := root / "unlabelled.txt").exists():
        stems = read_lines(path)
        pairs["unlabelled"] = pair_up(images, dict.fromkeys(stems), stems, path)
    if (root / "classes.txt").exists():
        classes = read_classes(root / "classes.txt")
    elif classes is None:
        classes = count_classes(labelled, root)
    names, palette = zip(*classes)
    return Dataset(name, names, palette, label_table(len(names)), pairs)


def open_nyuv2(root):
    """NYU Depth v2 as a folder: 40 classes (Gupta et al., CVPR 2013) or their 13 groups."""
    dataset = open_folder(root, "nyuv2", with_colours(NYU40))
    if len(dataset.classes) not in (13, 40):
        n = len(dataset.classes)
        raise UserError(f"{root}/classes.txt: {n} classes, NYUv2 has 40 or 13 here")
    return dataset


def open_cityscapes(root):
    """The official tree: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/."""
    names, ids, palette = zip(*CITYSCAPES)
    images = ("leftImg8bit", "{}/*", "_leftImg8bit.png")
    table, pairs = open_street(root, images, ("gtFine", "_gtFine_"), ids)
    return Dataset("cityscapes", names, palette, table, pairs, ids)


def open_acdc(root):
    """The official tree: rgb_anon/CONDITION/SPLIT/SEQUENCE/*_rgb_anon.png and gt/."""
    names, ids, palette = zip(*CITYSCAPES)
    if (root / "rgb_anon_trainvaltest").is_dir():  # unpacked into folders named after the archives
        images = ("rgb_anon_trainvaltest/rgb_anon", "*/{}/*", "_rgb_anon.png")
        labels = ("gt_trainval/gt", "_gt_")
    else:
        images, labels = ("rgb_anon", "*/{}/*", "_rgb_anon.png"), ("gt", "_gt_")
    table, pairs = open_street(root, images, labels, ids)
    return Dataset("acdc", names, palette, table, pairs, in_parts=True)


def open_street(root, images, labels, ids):
    """(table, pairs) of a tree of street scenes with Cityscapes' labels.

    images: folder, pattern of a split's folders, end of the file names; labels: folder, what their
    names have before labelIds.png. labelTrainIds are used if all exist. The official script, which
    makes them, is not needed: labelIds are mapped by the table as they are read.
    """
    (images, pattern, end), (folder, mark) = images, labels
    found = {}  # split -> [(stem, image, label without its end)]
    for split in ("train", "val", "test"):
        found[split] = []
        for image in sorted((root / images).glob(f"{pattern.format(split)}/*{end}")):
            if not is_image(image.name):
                continue
            inner = image.relative_to(root / images)
            stem = inner.as_posix()[: -len(end)]
            label = f"{root / folder / stem}{mark}"
            found[split].append((stem.replace(f"{split}/", "", 1), image, label))
        if split != "test" and not found[split]:
            raise Missing(f"{root / images}: no {pattern.format(split)}/*{end} in it")
    labelled = [pair for split in ("train", "val") for pair in found[split]]
    by_train_id = all(Path(f"{label}labelTrainIds.png").exists() for *_, label in labelled)
    kind = "labelTrainIds.png" if by_train_id else "labelIds.png"
    lost = [label + kind for *_, label in labelled if not Path(label + kind).exists()]
    if lost:
        raise UserError(f"{len(lost)} of {len(labelled)} labels are missing: {lost[0]} ...")
    pairs = {split: [(s, i, Path(p + kind)) for s, i, p in of] for split, of in found.items() if of}
    if "test" in pairs:  # its labels are withheld, or are dummies
        pairs["test"] = [(s, i, p if p.exists() else None) for s, i, p in pairs["test"]]
    if by_train_id:
        return label_table(19), pairs
    return label_table(ids, range(34)), pairs  # 255 is id -1, the license plate


def open_voc2012(root):
    """The official tree (VOCdevkit/VOC2012); trains on trainaug if it and its labels exist."""
    root = inside(root, "VOCdevkit/VOC2012", "VOC2012")
    lists, images = root / "ImageSets/Segmentation", files_in(root / "JPEGImages")
    labels = files_in(root / "SegmentationClass", (".png",))
    pairs = {
        s: pair_up(images, labels, read_lines(lists / f"{s}.txt"), lists) for s in ("train", "val")
    }
    if (root / "SegmentationClassAug").is_dir() and (lists / "trainaug.txt").exists():
        labels = files_in(root / "SegmentationClassAug", (".png",))
        stems = [Path(line.split()[-1]).stem for line in read_lines(lists / "trainaug.txt")]
        pairs["train"] = pair_up(images, labels, stems, lists / "trainaug.txt")
    return Dataset("voc2012", VOC, VOC_COLOURS, label_table(21), pairs)


def open_ade20k(root):
    """The official tree of the scene parsing challenge (ADEChallengeData2016), 150 classes."""
    root = inside(root, "ADEChallengeData2016")
    pairs = {}
    for split, folder in (("train", "training"), ("val", "validation")):
        images = files_in(root / "images" / folder)
        labels = files_in(root / "annotations" / folder, (".png",))
        stems = sorted(images.keys() | labels.keys())
        pairs[split] = pair_up(images, labels, stems, root / "images" / folder)
    ids = tuple(range(1, 151))  # 0 is "other objects"
    return Dataset("ade20k", ADE20K, colours(150), label_table(ids, [0]), pairs, ids)


def open_cocostuff164k(root):
    """COCO-Stuff: images/SPLIT2017/*.jpg, annotations/SPLIT2017/*.png of stuffthingmaps."""
    pairs = {}
    for split in ("train", "val"):
        images = files_in(inside(root, "images") / f"{split}2017")
        homes = ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017")
        maps = [root / home / f"{split}2017" for home in homes]  # COCO's annotations are JSON files
        maps = next((folder for folder in maps if folder.is_dir()), maps[0])
        labels = files_in(maps, (".png",))
        labels = {s: p for s, p in labels.items() if not s.endswith("_labelTrainIds")}
        pairs[split] = pair_up(images, labels, sorted(labels), maps)
    ids = tuple(k for k in range(182) if k not in COCO_STUFF_UNUSED)
    table = label_table(ids, COCO_STUFF_UNUSED)
    return Dataset("cocostuff164k", COCO_STUFF, colours(171), table, pairs, ids)


def open_cocostuff10k(root):
    """COCO-Stuff 10k v1.1: images/*.jpg, annotations/*.mat, imageLists/train.txt and test.txt."""
    images, labels = files_in(root / "images"), files_in(root / "annotations", (".mat",))
    pairs = {}
    for split, name in (("train", "train"), ("val", "test")):
        path = root / "imageLists" / f"{name}.txt"
        pairs[split] = pair_up(images, labels, read_lines(path), path)
    ids = tuple(k + 1 for k in range(182) if k not in COCO_STUFF_UNUSED)  # 0 is unlabelled
    table = label_table(ids, [0, *(k + 1 for k in COCO_STUFF_UNUSED)])
    return Dataset("cocostuff10k", COCO_STUFF, colours(171), table, pairs, ids)


DATASETS = {
    "scenes": None,
    "folder": open_folder,
    "camvid": open_camvid,
    "nyuv2": open_nyuv2,
    "cityscapes": open_cityscapes,
    "acdc": open_acdc,
    "voc2012": open_voc2012,
    "ade20k": open_ade20k,
    "cocostuff164k": open_cocostuff164k,
    "cocostuff10k": open_cocostuff10k,
}


def inside(root, *names):
    """The first of these folders that exists in root, or root itself."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def read_lines(path):
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [one_form(line.strip()) for line in lines if line.strip()]
    except FileNotFoundError:
        raise Missing(f"{path}: no such file (it lists the split's stems, one per line)") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8, save it as such") from None


def read_classes(path):
    classes, lines = [], read_lines(path)
    if not 1 <= len(lines) <= 255:
        raise UserError(f"{path}: {len(lines)} classes, 1 to 255 are possible (255 = ignore)")
    for line, colour in zip(lines, colours(len(lines))):
        words = line.replace(",", " ").split()
        if len(words) > 3 and all(w.isdigit() for w in words[-3:]):
            colour = tuple(map(int, words[-3:]))
            if max(colour) > 255:
                raise UserError(f"{path}: '{line}': red, green and blue are 0 to 255")
            classes.append((" ".join(words[:-3]), colour))
        else:
            classes.append((line, colour))
    names = [name for name, _ in classes]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        at = [k for k, name in enumerate(names) if name == twice[0]]
        raise UserError(f"{path}: classes {at[0]} and {at[1]} have the same name, '{twice[0]}'")
    if names[0].startswith("#"):
        raise UserError(f"{path}: '{lines[0]}' would be class 0: comments are not known here")
    return classes


def count_classes(paths, root):
    """Without classes.txt: one class per id up to the largest in the labels, named by number."""
    print(f"{root}/classes.txt is not there: reading {len(paths)} labels to count the classes")

    def largest(path):
        return max([-1, *set(np.unique(read_label(path)).tolist()) - {IGNORE}])

    n = max(in_parallel(largest, paths, "counting classes"), default=-1) + 1
    if n == 0:
        raise UserError(
            f"{root}/labels: every pixel is {IGNORE} (ignore), there is no class to learn"
        )
    return with_colours([f"class {k}" for k in range(n)])


def files_in(folder, suffixes=IMAGE_SUFFIXES):
    """stem -> path of the images in a folder."""
    if not folder.is_dir():
        raise Missing(f"{folder}: no such folder")
    found = {}
    names = sorted(e.name for e in os.scandir(folder) if is_image(e.name, suffixes))
    for path in map(folder.joinpath, names):
        stem = one_form(path.stem)
        if stem in found:
            both = f"{found[stem].name} and {path.name}"
            raise UserError(f"{folder}: {both} have the same stem, remove one of them")
        found[stem] = path
    return found


def one_form(text):
    """macOS writes an accent in a file's name as a character of its own, most keyboards do not."""
    return unicodedata.normalize("NFC", text)


def is_image(name, suffixes=PHOTO_SUFFIXES):
    """By the name. Hidden files are no images: macOS keeps ._a.jpg beside a.jpg."""
    return name.lower().endswith(suffixes) and name[0] != "."


def pair_up(images, labels, stems, source):
    """[(stem, image, label)]; UserError, naming `source`, if a file is missing."""
    for what, found in (("image", images), ("label", labels)):
        missing = [s for s in stems if s not in found]
        if missing:
            n, of = len(missing), len(stems)
            stem = Path(re.split(r"[\s,;]", missing[0])[0]).stem
            hint = f"; write {stem}, without folder and suffix" if stem in found else ""
            raise UserError(f"{source}: {n} of {of} have no {what}: {some(missing)}{hint}")
    return [(s, images[s], labels[s]) for s in stems]


# ------------------------------------------------------------------------------------------------
# reading files


def open_image(path):
    try:
        image = Image.open(path)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow only refuses twice as many
            raise Image.DecompressionBombError(f"{image.width}x{image.height}")
        image.load()
        return image
    except (OSError, SyntaxError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as an image ({e})") from e
    except Image.DecompressionBombError as e:
        raise UserError(f"{path}: refused, too large to be an image ({e})") from e


def read_image(path):
    return upright(open_image(path), path)


def upright(image, path):
    """(H, W, 3) uint8 pixels of an open image, turned upright by its EXIF orientation."""
    if image.mode[0] in "IF":
        rule = "photos must have 8 bits per channel (from 16 bits: divide by 257)"
        raise UserError(f"{path}: mode {image.mode}; {rule}")
    turn = image.getexif().get(ORIENTATION, 1)
    image = image.convert("RGB")
    image.info.clear()  # Pillow fails to write again some of what cameras have in their EXIF data
    image.getexif()[ORIENTATION] = turn
    return np.asarray(ImageOps.exif_transpose(image))


def read_mat(path, *names):
    """Variables of a MATLAB file up to v7: a list of int64 arrays."""
    try:
        from scipy.io import loadmat
    except ImportError as e:
        raise UserError(f"{path}: pip install scipy, to read .mat files") from e
    try:
        found = loadmat(path, appendmat=False, variable_names=names)
        with np.errstate(invalid="ignore"):  # NaN and inf are found below
            whole = [found[name].astype(np.int64) for name in names]
        for name, array in zip(names, whole):
            if (found[name] != array).any():
                raise ValueError(f"others in {name}")
        return whole
    except Exception as e:  # rubbish can raise anything
        problem = f"no MATLAB file up to v7 with whole numbers as {' and '.join(names)}"
        raise UserError(f"{path}: {problem} ({type(e).__name__}: {e})") from e


def read_label(path):
    """(H, W) uint8: the values in the file, which are indices in a palette image."""
    label = read_mat(path, "S")[0] if path.suffix == ".mat" else np.asarray(open_image(path))
    if label.ndim != 2:
        raise UserError(
            f"{path}: a label must have one channel of class ids, this one has {label.shape[2]} "
            "(a picture in the colours of the classes? convert it to ids first)"
        )
    if label.dtype.kind == "f":
        raise UserError(f"{path}: floating point values, a label has whole class ids")
    if label.max(initial=0) <= 255 and label.min(initial=0) >= 0:
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


def resize_image(image, short_side):
    """uint8 image (H, W, 3), its shorter side resized, to 32 at least; as it is if that is None.

    The longer side is rounded down, as by torchvision and by transformers' image processors.
    """
    h, w = image.shape[:2]
    shorter = min(h, w)
    if not short_side or short_side == shorter:
        return image
    size = (max(32, w * short_side // shorter), max(32, h * short_side // shorter))
    return np.asarray(Image.fromarray(image).resize(size, Image.BILINEAR))


def resize_label(label, size):
    """Label (H, W) -> (h, w) = size, each pixel the nearest one."""
    return np.asarray(Image.fromarray(label).resize(size[::-1], Image.NEAREST))


def read_pair(pair, table):
    """Image (H, W, 3) and train-id label (H, W) of one entry of Dataset.pairs."""
    if isinstance(pair, int):
        return scenes.draw(pair)
    image = read_image(pair[1])
    if pair[2] is None:
        return image, np.full(image.shape[:2], IGNORE, np.uint8)
    return image, fit_label(read_label(pair[2]), image, pair, table)


def fit_label(label, image, pair, table):
    """The train ids of a label as read; UserError if it is tiny or not of its image's size."""
    _, image_path, label_path = pair
    if image.shape[:2] != label.shape:
        (h, w), (lh, lw) = image.shape[:2], label.shape
        turned = (
            " (rotated? the image's EXIF orientation is respected)" if (h, w) == (lw, lh) else ""
        )
        raise UserError(f"{label_path}: {lw}x{lh}, but its image {image_path} is {w}x{h}{turned}")
    if min(label.shape) < 32:
        raise UserError(f"{image_path}: {label.shape[1]}x{label.shape[0]}, 32x32 is the smallest")
    return map_label(label, table, label_path)


def in_parallel(work, items, title):
    """Yield work(item) of all items, computed by threads, in order; prints progress lines."""
    progress = Progress(title, len(items))
    with ThreadPoolExecutor() as pool:
        for done in range(0, len(items), 32):  # a few at a time: memory stays small
            progress.at(done)
            yield from pool.map(work, items[done : done + 32])
