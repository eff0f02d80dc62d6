"""
The usual mistakes in labels: how they are recognised and reported.

First those that one pair of files shows if it cannot be used; then one small function per mistake
that only many labels show together. Files are given as what the doctor saw in them (`Seen`).
Findings of LIKELY and LIKELY_IN_ALL are sure enough to fail a check, those of PERHAPS are not.
"""

import functools
import os
import re

import numpy as np
from PIL import Image

import catalog
from catalog import ORIENTATION, open_image
from distill import IGNORE
from files import UserError, some

GREY, PALETTE = 0, 3  # kinds of PNG
SIDEWAYS = (5, 6, 7, 8)  # the orientations that swap width and height
VOID_NAME = "void|unlabell?ed|ignored?|unknown|no ?data|no ?label|don ?t ?care|out of roi"
WHITE_AND_VOC_BORDER = (255, 255, 255), (224, 224, 192)
SOFT = 0.12  # steps per edge: up to 0.03 in labels as drawn, 0.13 to 0.8 after interpolation
ANEW = "make them anew from the originals, as PNG, and resize with NEAREST if at all"

# ------------------------------------------------------------------------------------------------
# one pair that cannot be used: (message, what it shows), or None where the error says enough


def diagnose(pair, dataset):
    for path in pair[1:]:
        if path is None or path.suffix == ".mat":
            return None
        try:
            opened = open_image(path)
        except UserError as e:
            return broken(path, str(e)), path.name
    pixels = np.asarray(opened)  # the last is the label
    if opened.format == "JPEG":
        return f"a label that is a JPEG inside, which destroys class ids: {ANEW}", path.name
    if pixels.ndim == 3:
        return in_colour(pixels, dataset)
    if pixels.max(initial=0) > 255 and pixels.dtype.kind in "iu":
        values = np.unique(pixels)
        return numbering(values), f"{len(values)} values up to {values[-1]}"
    return misfit(open_image(pair[1]), opened)


def start_of(path):
    with open(path, "rb") as f:
        return f.read(32)


def png_kind(start):
    """(bits, GREY, PALETTE or another number) of the PNG that starts so; else (None, None)."""
    whole = start.startswith(b"\x89PNG") and len(start) > 25
    return (start[24], start[25]) if whole else (None, None)


def palette_of(path):
    """The colours of a palette PNG's indices, three bytes each."""
    with Image.open(path) as opened:
        return bytes(opened.palette.getdata()[1])


def why_unpaired(root, error):
    """A hint to add to "... have no label: STEM", from the files where labels would be."""
    missing = re.search(r"have no label: (.+?)( \.\.\.|,|$)", error)
    for folder in sorted(root.iterdir()) if missing else ():
        if folder.is_dir() and re.search("label|annot|mask|Class", folder.name):
            if missing[1] in catalog.files_in(folder, (".jpg", ".jpeg")):
                return f"; the labels in {folder} are JPEG, which destroys class ids: {ANEW}"
            like = re.compile(re.escape(missing[1]) + r"(?![0-9A-Za-z]).+")
            for path in sorted(folder.iterdir()):
                if like.match(path.name):
                    return f"; {folder} has {path.name}, where {missing[1]}.png is looked for"
    return ""


def broken(path, error):
    start = start_of(path) if path.is_file() and os.access(path, os.R_OK) else None
    if start is None:
        return "no file, a link to none, or one that you may not read"
    if not start:
        return "empty, 0 bytes: copy or fetch it again"
    if start.startswith(b"version https"):
        return "a pointer of Git LFS, not the file itself: git lfs pull"
    if "refused" in error:
        return "so large that it may be a decompression bomb: cut it into tiles"
    if start.startswith((b"\x89PNG", b"\xff\xd8")):
        return "cut off or damaged: copy, extract or fetch it again"
    return "neither PNG nor JPEG inside, whatever its name says"


def palettes(dataset):
    """(whose, colours): the data set's, if it has its own, and PASCAL VOC's, 21 and then all."""
    voc = ((0, 0, 0), *catalog.colours(255))
    if tuple(dataset.palette) != voc[1 : len(dataset.palette) + 1]:
        yield "this data set", dataset.palette
    yield "PASCAL VOC", voc[:21]
    yield "PASCAL VOC", voc


def in_colour(pixels, dataset):
    channels = pixels.shape[2]
    rgb = pixels[..., : 3 if channels > 2 else 1].astype(np.int32)
    ids = np.unique(rgb @ [1, 256, 65536][: rgb.shape[2]])  # numbered as in panoptic files
    shows = f"{channels} channels, {len(ids)} colours"
    if (rgb == rgb[..., :1]).all():
        return "a grey picture in several channels: keep one of the equal ones", shows
    found = {(v % 256, v // 256 % 256, v // 65536) for v in ids[:1000].tolist()}
    for whose, palette in palettes(dataset):
        if len(ids) < 1000 and found <= {(0, 0, 0), *palette, *WHITE_AND_VOC_BORDER}:
            return f"in the colours of {whose}: save one channel, the ids of the classes", shows
    if "instanceIds" in numbering(ids):
        return f"a panoptic picture, r + 256 g + 65536 b: {numbering(ids)}", shows
    if len(ids) > 256:
        return f"more colours than classes: a photo, or a picture of colours resized? {ANEW}", shows
    return "in the colours of no palette known here: save one channel, the ids of classes", shows


def numbering(values):
    """What ids above 255 may be, from all distinct `values`, sorted."""
    things = values // 1000
    if values[-1] >= 24000 and ((values < 34) | (things >= 24) & (things < 34)).all():
        return "Cityscapes instanceIds (class * 1000 + instance): take the labelIds files"
    for factor in (257, 256):
        if (values % factor == 0).all():
            return f"ids times {factor}, from 8 to 16 bits: divide by {factor}"
    if values[-1] == 65535 and values[-2] < 256:
        return f"void as 65535, which is -1 in 16 bits: store {IGNORE}, in 8 bits"
    if len(values) > 256:
        return "more values than classes: a depth map, or numbered instances?"
    if (values % 1000 < 256).all() and things[-1] < 256:
        return "panoptic ids (class * 1000 + instance): divide by 1000, drop the rest"
    return "ids above 255: of instances, or of a data set with more classes?"


def misfit(photo, label):
    turn, own = (opened.getexif().get(ORIENTATION, 1) for opened in (photo, label))
    size = photo.size[::-1] if turn in SIDEWAYS else photo.size  # upright
    shows = "photo {}x{} with EXIF orientation {}, label {}x{}"
    shows = shows.format(*photo.size, turn, *label.size)
    if size == label.size:
        return None
    if own in SIDEWAYS and size == label.size[::-1]:
        return f"the label has EXIF orientation {own}, which counts for photos only", shows
    if photo.size == label.size:
        return f"the photo is turned upright by EXIF orientation {turn}, its label is not", shows
    if size != label.size[::-1]:
        return "labels of another size than their photos: resize them with NEAREST", shows
    return "photo and label are rotated against each other: turn the labels", shows


# ------------------------------------------------------------------------------------------------
# what many files show together: a message, or None


def pixels_of(files):
    """(256,) number of pixels of each value."""
    return sum((seen.counts for seen in files), np.zeros(256, np.int64))


def by_class(files, dataset):
    """(256,) number of pixels of each class, and of void at IGNORE."""
    allowed, counts = dataset.table >= 0, np.zeros(256, np.int64)
    np.add.at(counts, dataset.table[allowed], pixels_of(files)[allowed])
    return counts


def values_of(files, dataset):
    """(values in the files, smallest and largest that the data set allows), without IGNORE."""
    values = [int(v) for v in np.flatnonzero(pixels_of(files)) if v != IGNORE]
    allowed = [int(v) for v in np.flatnonzero(dataset.table >= 0) if v != IGNORE]
    return values, allowed[0], allowed[-1]


def unnamed(dataset):
    return dataset.classes[0] == "class 0"  # no classes.txt: classes were counted in the labels


def is_void(counts, dataset):
    return counts.any() and not counts[dataset.table != IGNORE].any()


def is_soft(seen, dataset):
    """Whether many edges pass through values in between, as after interpolation.

    Noise leaves single pixels of other values too: there must be few of those, or many of the
    pixels in between must have values without a class.
    """
    steps, strange = seen.between.sum(), seen.between[dataset.table < 0].sum()
    no_noise = steps > 0.4 * seen.narrow or strange > 0.3 * steps
    return seen.edges >= 50 and steps > SOFT * seen.edges and no_noise


def interpolated(files, dataset):
    """Soft labels, unless the values in between are one or two thin classes: drawn outlines."""
    soft = [seen for seen in files if is_soft(seen, dataset)]
    if not soft or len(soft) < 0.05 * len(files):
        return None
    between = sum(s.between for s in soft)
    thin = (between > 0.3 * pixels_of(soft)) & (dataset.table >= 0)
    if np.sort(between * thin)[-2:].sum() < 0.8 * between.sum():
        share = between.sum() / sum(s.edges for s in soft)
        return (
            f"resized with interpolation, or once a JPEG: {len(soft)} of {len(files)} labels, such "
            f"as {soft[0].stem}, go over values in between at {share:.0%} of their edges: {ANEW}"
        )


def grey_palette(files, dataset):
    values, _, largest = values_of(files, dataset)
    for whose, palette in palettes(dataset):
        shown = Image.fromarray(np.uint8([[(0, 0, 0), *palette, *WHITE_AND_VOC_BORDER]]))
        grey = set(np.asarray(shown.convert("L")).ravel().tolist())
        unlikely = (len(grey) / 256) ** len(values) < 1e-3
        if unlikely and grey >= set(values) and (values[-1] > largest or unnamed(dataset)):
            return f"grey levels of {whose}'s colours ({some(values)}): save the ids of the classes"


def few_bits(files, dataset):
    """Void in a palette that ends before 255: the file keeps only the lowest bits."""
    counts = pixels_of(files)
    cut = [seen for seen in files if seen.top < IGNORE and seen.counts[seen.top]]
    cut = [s for s in cut if dataset.table[s.top] < 0 or unnamed(dataset) and not counts[s.top - 1]]
    if cut:
        return (
            f"{len(cut)} of {len(files)} labels, such as {cut[0].stem}, have a palette that ends "
            f"at {cut[0].top}: void, {IGNORE}, became {cut[0].top} when they were written. Write "
            "them anew with 8 bits per pixel, mode L"
        )


def minus_one(files, dataset):
    values, smallest, largest = values_of(files, dataset)
    if values[1:] and values[-1] == 254 and smallest <= values[0] and values[-2] < largest < 254:
        return (
            f"shifted by minus one: values up to {values[-2]}, then 254 and 255, which were void "
            "and 0? Add 1, in 8 bits"
        )


def street_ids(files, dataset):
    values, k = values_of(files, dataset)[0], len(dataset.classes)
    share = pixels_of(files)[k:34].sum() / max(pixels_of(files).sum(), 1)
    if k in (19, 20) and share > 0.05 and k < values[-1] <= 33 and dataset.table[values[-1]] < 0:
        return (
            f"values up to {values[-1]}: raw Cityscapes ids (0 to 33), not the 19 train ids? Take "
            "the labelTrainIds files, or --dataset cityscapes, which maps them"
        )


def plus_one(files, dataset):
    values, first, last = values_of(files, dataset)
    if values and values[0] == first + 1 and values[-1] == last + 1:
        return (
            f"labels run from {first + 1} to {last + 1}: shifted by one? Ids start at {first}, and "
            f"void is {IGNORE}: subtract 1 from all others"
        )


def one_too_many(files, dataset):
    values, first, last = values_of(files, dataset)
    if values and values[0] == first and values[-1] == last + 1:
        share = pixels_of(files) / pixels_of(files).sum()
        return (
            f"labels run from {first} to {last + 1}, one too many: is {first} void? It has "
            f"{share[first]:.1%} of the pixels; then subtract 1. Or is {last + 1}, with "
            f"{share[last + 1]:.1%}? Void must be {IGNORE}. Or does a class lack its name?"
        )


def without_class(files, dataset):
    strange = [v for v in values_of(files, dataset)[0] if dataset.table[v] < 0]
    if strange:
        share = pixels_of(files)[strange].sum() / pixels_of(files).sum()
        these = [seen.stem for seen in files if seen.counts[strange].any()]
        return (
            f"{len(these)} of {len(files)} labels, such as {these[0]}, have values without a class "
            f"({some(strange)}; {share:.2%} of all pixels): other ids, a name too few, or a JPEG?"
        )


def many_palettes(files, dataset):
    first = {}  # index -> its colour, and the file that shows it
    for seen in files:
        for k in np.flatnonzero(seen.counts) if seen.palette else ():
            colour = tuple(seen.palette[3 * k : 3 * k + 3])
            was, stem = first.setdefault(k, (colour, seen.stem))
            if was != colour:
                return (
                    f"the colour of {k} is {was} in {stem} and {colour} in {seen.stem}: each file "
                    f"has a palette, and numbers, of its own: {ANEW}"
                )


def one_bit(files, dataset):
    """What saves a label of 0 and 255 alone in the fewest bits makes 255 a 1."""
    thin = [seen for seen in files if seen.one_bit and seen.counts[1]]
    if thin and any(seen.counts[2:].any() for seen in files):
        return (
            f"{len(thin)} of {len(files)} labels, such as {thin[0].stem}, have one bit a pixel and "
            f"are read as 0 and 1: is their white class 1, or {IGNORE}? {ANEW}"
        )


LIKELY = [many_palettes, one_bit, interpolated, few_bits, grey_palette, minus_one, street_ids]
LIKELY += [plus_one, one_too_many, without_class]  # only the first message is reported

# ------------------------------------------------------------------------------------------------
# what all splits, {split: files}, show: a message, or None


def every(splits):
    return [seen for files in splits.values() for seen in files]


def all_void(splits, dataset):
    for split in ("train", "val"):  # test labels may be dummies
        if is_void(pixels_of(splits[split]), dataset):
            what = "learn" if split == "train" else "score"
            return f"every pixel of {split} is void ({IGNORE}): there is nothing to {what}"


def binary(splits, dataset):
    if unnamed(dataset) or len(dataset.classes) > 1:
        return one_class(splits, dataset)


def one_class(splits, dataset):
    found = np.flatnonzero(pixels_of(every(splits))).tolist()
    if found == [0, IGNORE]:
        return f"only 0 and {IGNORE} occur: is {IGNORE} the foreground? It is void here: store 1"
    if len(found) == 1:
        return f"only {found[0]} occurs, so that every guess is right: is there no background?"


def street_classes(splits, dataset):
    if unnamed(dataset):
        return street_shares(splits, dataset)


def street_shares(splits, dataset):
    counts = pixels_of(every(splits))[: len(dataset.classes)]
    share = counts / max(counts.sum(), 1)
    if 27 <= len(share) <= 34 and share[[7, 11, 21]].min() > 0.03:
        common = share[[7, 8, 11, 21, 23, 26]].sum()
        if common > 0.6 and share[[5, 6, 9, 10, 14, 15, 16, 18]].sum() < 0.08:
            return (
                f"shares as of raw Cityscapes ids: road (7), building (11), vegetation (21) and "
                f"3 more have {common:.0%}. Void would be learnt: --dataset cityscapes maps them"
            )


def from_one(splits, dataset):
    if unnamed(dataset) and values_of(every(splits), dataset)[0][:1] == [1]:
        return "labels start at 1 and 0 never occurs: shifted by one? Ids start at 0: subtract 1"


def first_missing(splits, dataset):
    values, first, last = values_of(every(splits), dataset)
    if values and values[0] == first + 1 and values[-1] == last:
        return f"{first} never occurs, while {last} does: shifted by one? Ids start at {first}"


def mostly_foreign(splits, dataset, ours, others):
    counts, theirs = (by_class(splits[split], dataset)[:IGNORE] for split in (ours, others))
    share = counts[theirs == 0].sum() / max(counts.sum(), 1)
    if share > 0.5 and theirs.any():
        return f"{share:.0%} of {ours}'s pixels are of classes that {others} never has: other ids?"


strangers = functools.partial(mostly_foreign, ours="val", others="train")
never_in_val = functools.partial(mostly_foreign, ours="train", others="val")


def void_class(splits, dataset):
    share = by_class(every(splits), dataset) / max(pixels_of(every(splits)).sum(), 1)
    for k, name in enumerate(dataset.classes):
        if share[k] and re.fullmatch(VOID_NAME, re.sub(r"[\W_]+", " ", name).strip().lower()):
            return (
                f"class {k} is called '{name}' and would be learnt and scored ({share[k]:.1%} of "
                f"the pixels): void must be {IGNORE}"
            )


def void_as_zero(splits, dataset):
    """Void lies between most objects, yet is less than half of all pixels, unlike background."""
    files, counts = every(splits), pixels_of(every(splits))
    share = sum(s.edges_at_0 for s in files) / max(sum(s.edges for s in files), 1)
    if len(dataset.classes) > 3 and dataset.table[0] == 0 and not counts[IGNORE] and share > 0.8:
        if counts[0] < 0.5 * counts.sum() and dataset.classes[0].lower() != "background":
            return (
                f"0 lies at {share:.0%} of all edges and {IGNORE} never occurs: is 0 void? Then it "
                f"must be {IGNORE}, and every other id one less"
            )


def never_in_train(splits, dataset):
    train, val = (by_class(splits[split], dataset) for split in ("train", "val"))
    absent = [k for k in range(len(dataset.classes)) if not train[k]]
    if absent and train.any():
        scored = [dataset.classes[k] for k in absent if val[k]]
        also = f"; of these val has {some(scored)}, scored but never learnt" * bool(scored)
        names = some(dataset.classes[k] for k in absent)
        return (
            f"{len(absent)} of {len(dataset.classes)} classes never occur in train: {names}{also}"
        )


def void_files(splits, dataset):
    files = [*splits["train"], *splits["val"]]
    empty = [seen.stem for seen in files if is_void(seen.counts, dataset)]
    if empty:
        return f"{len(empty)} of {len(files)} labels are void all over: {some(empty)}"


def turned(splits, dataset):
    files = [seen for seen in every(splits) if any(seen.contrast)]
    ours, others = (sum(seen.contrast[k] for seen in files) for k in (0, 1))
    if ours < 0.8 * others:
        return (
            f"{len(files)} photos, such as {files[0].stem}, are turned upright by their EXIF "
            "orientation, and their labels would fit better if they were turned too"
        )


LIKELY_IN_ALL = [all_void, binary, street_classes, from_one, strangers]  # also the first only
PERHAPS = [one_class, street_shares, void_class, void_as_zero, first_missing, never_in_train]
PERHAPS += [never_in_val, void_files, turned]  # all messages are reported
