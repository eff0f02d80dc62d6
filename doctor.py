"""
The label doctor: reports what is in a data set, and what is wrong with it.

Every pair is decoded once, and a few counts of it are kept (`Seen`), which `mistakes.py` judges.
"""

import collections
import dataclasses
import functools
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import catalog
import downloads
import mistakes
from catalog import ORIENTATION, files_in, in_parallel, open_image
from distill import IGNORE, paper_weights
from files import UserError, some

# ------------------------------------------------------------------------------------------------
# reading


def no_pixels():
    return np.zeros(256, np.int64)


@dataclasses.dataclass
class Seen:
    """What the doctor saw in one pair of files."""

    stem: str
    size: tuple | None = None  # of the image, if the pair can be used
    error: str | None = None  # if it cannot
    mistake: tuple | None = None  # (message, what this pair shows of it)
    counts: np.ndarray = dataclasses.field(default_factory=no_pixels)  # pixels of each value
    edges: int = 0  # see edges_of
    edges_at_0: int = 0
    narrow: int = 0
    between: np.ndarray = dataclasses.field(default_factory=no_pixels)
    contrast: tuple = (0, 0)  # see contrast_of
    top: int = IGNORE  # the largest value that the label's file can hold
    palette: bytes = b""  # of the label's file, see palette_of
    one_bit: bool = False  # whether that is of black and white, which are read as 0 and 1

    def add_form(self, path, start):
        bits, kind = mistakes.png_kind(start)
        self.one_bit = (bits, kind) == (1, mistakes.GREY)
        if kind == mistakes.PALETTE:
            self.top, self.palette = 2**bits - 1, mistakes.palette_of(path)

    def add(self, label):
        self.counts = np.bincount(label.ravel(), minlength=256)
        self.edges, self.edges_at_0, self.narrow, self.between = edges_of(label)


def examine(pair, dataset):
    if isinstance(pair, int):
        image, label = catalog.read_pair(pair, dataset.table)
        seen = Seen(f"scene {pair}", image.shape[:2])
        seen.add(label)
        return seen
    seen = Seen(pair[0])
    try:
        if pair[2] is not None:  # not withheld
            label, start = catalog.read_label(pair[2]), mistakes.start_of(pair[2])
            if start.startswith(b"\xff\xd8"):
                raise UserError(f"{pair[2]}: a JPEG inside, which keeps no ids")
            seen.add_form(pair[2], start)
            seen.add(label)
        photo = open_image(pair[1])
        image = catalog.upright(photo, pair[1])
        if pair[2] is not None:
            catalog.fit_label(label, image, pair, dataset.table)
            seen.contrast = contrast_of(image, label, photo.getexif().get(ORIENTATION))
        seen.size = image.shape[:2]
    except UserError as e:
        seen.error, seen.mistake = str(e), mistakes.diagnose(pair, dataset)
    return seen


def edges_of(label):
    """(edges, edges at 0, pixels unlike both neighbours, (256,) pixels in between by value).

    A pixel is in between if one neighbour is lower and the other higher: interpolation leaves such
    pixels at the edges of any two classes that are not consecutive.
    """
    edges, at_0, narrow, between = 0, 0, 0, no_pixels()
    for y in (label, label.T):
        up, down = y[:, :-1] < y[:, 1:], y[:, :-1] > y[:, 1:]
        edges += np.count_nonzero(up) + np.count_nonzero(down)
        at_0 += np.count_nonzero(up & (y[:, :-1] == 0)) + np.count_nonzero(down & (y[:, 1:] == 0))
        narrow += np.count_nonzero((up | down)[:, :-1] & (up | down)[:, 1:])
        steps = (up[:, :-1] & up[:, 1:]) | (down[:, :-1] & down[:, 1:])
        between += np.bincount(y[:, 1:-1][steps], minlength=256)
    return edges, at_0, narrow, between


def contrast_of(image, label, turn):
    """An image's mean step at its label's edges, and at the edges of the label turned like it."""
    if turn not in range(2, 9):  # 1 is upright
        return 0, 0
    picture = Image.fromarray(label)
    picture.getexif()[ORIENTATION] = turn
    turned = np.asarray(ImageOps.exif_transpose(picture))
    if turned.shape != label.shape:
        return 0, 0
    steps = np.abs(np.diff(image.astype(np.int16).sum(2), axis=1))
    at_edges = [steps[y[:, 1:] != y[:, :-1]] for y in (label, turned)]
    return tuple(s.mean() if s.size else 0 for s in at_edges)


def open_for_check(name, data_dir):
    """The data set. One without classes.txt has 255 classes until its labels have been read."""
    root, options = Path(data_dir or ""), {}
    if name == "folder" and not (root / "classes.txt").exists():
        options["classes"] = catalog.with_colours([f"class {k}" for k in range(255)])
    try:
        return catalog.open_dataset(name, data_dir, **options)
    except UserError as e:
        raise UserError(f"{e}{mistakes.why_unpaired(root, str(e))}") from e


def keep_counted(dataset, splits):
    """The data set with only as many of its 255 classes as the labels have."""
    values = np.flatnonzero(mistakes.pixels_of(mistakes.every(splits))[:IGNORE])
    n = int(max(values, default=0)) + 1
    print(f"no classes.txt: {n} classes, counted in the labels")
    kept = dict(classes=dataset.classes[:n], palette=dataset.palette[:n])
    return dataclasses.replace(dataset, table=catalog.label_table(n), **kept)


# ------------------------------------------------------------------------------------------------
# reporting


def check(args):
    """python data.py check: sizes, histogram, mistakes; UserError if any is more than a guess."""
    if args.dataset == "scenes" and args.data_dir:
        raise UserError("--data-dir has no effect on the drawn scenes: pass --dataset")
    folder = catalog.folder_of(args.dataset, args.data_dir)
    dataset, splits = open_for_check(args.dataset, folder), {}
    for split, pairs in dataset.pairs.items():
        work = functools.partial(examine, dataset=dataset)
        splits[split] = list(in_parallel(work, pairs, f"check {split}"))
    if mistakes.unnamed(dataset) and len(dataset.classes) == 255:
        dataset = keep_counted(dataset, splits)
    errors, in_files, in_values = [], [], []
    for split, files in splits.items():
        in_split = first_of(mistakes.LIKELY, files, dataset)
        in_files += report(split, files, dataset, in_split)
        in_values += in_split
        errors += [seen.error for seen in files if seen.error]
    if not in_values:
        in_values = first_of(mistakes.LIKELY_IN_ALL, splits, dataset)
        print_findings("likely", in_values)
    if not in_values:
        found = filter(None, [judge(splits, dataset) for judge in mistakes.PERHAPS])
        print_findings("perhaps", found)
    twice = same_images(dataset.pairs)
    for message in twice:
        print(message)
    if args.dataset != "scenes":
        report_spare_files(Path(folder), dataset)
    problems = [*in_files, *in_values, *twice, *errors]
    if problems:
        raise UserError(f"{len(problems)} problem(s) in {folder}; the first: {problems[0]}")
    print("no problem found")


def first_of(judges, files, dataset):
    return [message for judge in judges if (message := judge(files, dataset))][:1]


def print_findings(how_sure, found):
    for message in found:
        print(f"  {how_sure}: {message}")


def report(split, files, dataset, in_split):
    """Print a split's contents and mistakes; returns the mistakes that single pairs show."""
    sizes = sorted({seen.size for seen in files if seen.size})
    shown = some([f"{w}x{h}" for h, w in sizes], 4) or "none readable"
    print(f"{split}: {len(files)} images, {len(sizes)} size(s): {shown}")
    wrong = [seen.error for seen in files if seen.error]
    print("\n".join(wrong[:10] + ["..."] * (len(wrong) > 10)) or "  every pair is readable")
    alike = {}  # what is wrong -> the pairs that show this mistake
    for seen in files:
        if seen.mistake:
            alike.setdefault(seen.mistake[0], []).append(seen)
    in_files = [
        f"{len(same)} of {len(files)} pairs, such as {same[0].stem} ({same[0].mistake[1]}): {what}"
        for what, same in alike.items()
    ]
    print_findings("likely", in_files + in_split)
    total, counts = mistakes.pixels_of(files).sum(), mistakes.by_class(files, dataset)
    if not total:
        print("  no labels")
        return in_files
    classes = torch.from_numpy(counts[: len(dataset.classes)])
    weights = paper_weights(classes) if split == "train" and classes.any() else ()
    for k, name in [*enumerate(dataset.classes), (IGNORE, "(ignored)")]:
        weight = f"  paper's weight {weights[k]:5.2f}" if k < len(weights) else ""
        print(f"  {k:3d} {name:20s} {100 * counts[k] / total:6.2f} %  {counts[k]:>12d} px{weight}")
    return in_files


def same_images(pairs):
    """Messages on images that a split has more than once, and on images to learn from that are in
    val or test too: the same file, or another with the same bytes."""
    splits = [split for split in ("train", "unlabelled") if split in pairs]
    held = [split for split in ("val", "test") if split in pairs]
    found = [message for split in (*splits, *held) for message in repeated(split, pairs)]
    digest = functools.cache(downloads.digest)
    for split, other in itertools.product(splits, held):
        found += same_in_both(split, other, pairs, digest)
    return found


def repeated(split, pairs):
    again = [pair for pair, count in collections.Counter(pairs[split]).items() if count > 1]
    names = sorted(stem for stem, *_ in again)
    return [f"{len(names)} images are in {split} more than once: {some(names)}"] if names else []


def same_in_both(split, held, pairs, digest):
    if isinstance(pairs[split][0], int):
        both = set(pairs[split]) & set(pairs[held])
        return [f"{len(both)} images are in {split} and in {held}: {min(both)} ..."] if both else []
    train, val = ({pair[1]: pair[0] for pair in pairs[name]} for name in (split, held))
    found, both = [], sorted(train.keys() & val.keys())
    if both:
        found.append(f"{len(both)} images are in {split} and in {held}: {train[both[0]]} ...")
    sizes = {}
    for path in filter(Path.is_file, train):
        sizes.setdefault(path.stat().st_size, []).append(path)
    twins = [
        f"{train[path]} is {val[other]}"
        for other in filter(Path.is_file, val)
        for path in sizes.get(other.stat().st_size, [])
        if path != other and digest(path) == digest(other)
    ]
    if twins:
        found.append(
            f"{len(twins)} images of {split} are in {held} under another name, byte for byte the "
            f"same: {some(twins)}"
        )
    return found


def report_spare_files(root, dataset):
    """Print which files of the folder layout are in no split."""
    named = {pair[0] for pairs in dataset.pairs.values() for pair in pairs}
    for folder in ("images", "labels"):
        spare = sorted(files_in(root / folder).keys() - named) if (root / folder).is_dir() else []
        if spare:
            print(f"{len(spare)} files in {folder}/ are in no split: {some(spare)}")
