"""The doctor names each mistake, no other, and none where there is none."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_catalog
from conftest import write_folder
from PIL import Image
from test_data import write_camvid

import catalog
import classes
import data
import doctor
import prepare
import scenes
from files import UserError

WORDS = {  # what to look for in the doctor's words, for each mistake
    "raw street ids": r"raw Cityscapes ids",
    "void": r"every pixel of (train|val) is void",
    "void files": r"labels are void all over",
    "one class": r"only 0 occurs, so that every guess is right",
    "void class": r"is called '.*' and would be learnt",
    "void is 0": r"is 0 void\? Then",
    "one too many": r"one too many",
    "shifted": r"shifted by one\?",
    "palettes": r"each file has a palette, and numbers, of its own",
    "one bit": r"have one bit a pixel and are read as 0 and 1: is their white class 1, or 255\?",
    "few bits": r"have a palette that ends at \d+: void, 255, became \d+ when",
    "shifted down": r"shifted by minus one",
    "palette": r"in the colours of this data set",
    "voc palette": r"in the colours of PASCAL VOC",
    "colours": r"in the colours of no palette known",
    "photo": r"more colours than classes",
    "grey": r"a grey picture in several channels",
    "grey levels": r"grey levels of",
    "panoptic picture": r"a panoptic picture",
    "interpolated": r"resized with interpolation",
    "jpeg": r"a JPEG inside",
    "exif": r"turned upright by EXIF orientation \d, its label is not",
    "exif of label": r"the label has EXIF orientation",
    "exif by sight": r"would fit better if they were turned too",
    "rotated": r"rotated against each other",
    "size": r"labels of another size",
    "instances": r"(?<!65536 b): Cityscapes instanceIds",
    "times 256": r"ids times 256",
    "times 257": r"ids times 257",
    "65535": r"void as 65535",
    "depth": r"a depth map",
    "panoptic": r"panoptic ids \(class \* 1000",
    "wide": r"ids above 255",
    "cut off": r"cut off or damaged",
    "empty": r"empty, 0 bytes",
    "no image": r"neither PNG nor JPEG inside",
    "lfs": r"pointer of Git LFS",
    "link": r"a link to none",
    "bomb": r"a decompression bomb",
    "binary": r"is 255 the foreground\?",
    "other ids": r"values without a class",
    "strangers": r"pixels are of classes that .* never has",
    "never in train": r"classes never occur in train",
    "twins": r"in val under another name",
}
COLOURS = np.random.default_rng(5).integers(0, 256, (256, 3)).astype(np.uint8)


def blocks(seed, k, height=64, width=96, size=8, share=None):
    """A label of blocks in which all k classes occur, or classes by their shares."""
    rng = np.random.default_rng(seed)
    n = height // size * (width // size)
    ids = np.resize(np.arange(k), n) if share is None else rng.choice(len(share), n, p=share)
    label = np.kron(rng.permutation(ids).reshape(height // size, -1), np.ones((size, size), int))
    return np.roll(label, (3, 2), (0, 1))  # no edge falls where it would if all was turned


def write(root, labels, names=None, void=True):
    """The folder layout with these labels, a third of them for val, and photos to match."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for i, label in enumerate(labels):
        label = np.asarray(label).astype(np.uint8)
        if void:
            label[:, :2] = 255
        noise = np.random.default_rng(i).integers(0, 9, (*label.shape, 1))
        photo = np.clip(COLOURS[label].astype(int) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(photo).save(root / "images" / f"p{i}.png")
        Image.fromarray(label).save(root / "labels" / f"p{i}.png")
    stems, cut = [f"p{i}" for i in range(len(labels))], 2 * len(labels) // 3
    (root / "train.txt").write_text("\n".join(stems[:cut]))
    (root / "val.txt").write_text("\n".join(stems[cut:]))
    if names:
        (root / "classes.txt").write_text("\n".join(names))
    return root


def town(root, k=11, n=6, names="auto", void=True, **kw):
    names = [f"thing {i}" for i in range(k)] if names == "auto" else names
    return write(root, [blocks(i, k, **kw) for i in range(n)], names, void)


def relabel(root, change, only=None):
    for path in sorted((root / "labels").iterdir())[:only]:
        Image.fromarray(change(np.asarray(Image.open(path)).copy())).save(path)


def check(root, capsys, name="folder"):
    """(mistakes named, all that was printed, the error or None)."""
    error = None
    try:
        doctor.check(SimpleNamespace(dataset=name, data_dir=str(root)))
    except UserError as e:
        error = str(e)
    out = capsys.readouterr().out
    told = [
        line for line in out.splitlines() if re.match(r"  (likely|perhaps)|\d+ images of", line)
    ]
    named = {key for key, words in WORDS.items() if any(re.search(words, line) for line in told)}
    known = [line for line in told if any(re.search(words, line) for words in WORDS.values())]
    assert told == known, "a mistake that this test does not know"
    return named, out, error


# ------------------------------------------------------------------------------------------------
# nothing wrong


def poles(seed):
    """Thin things of every class in and between large ones."""
    label = blocks(seed, 6, size=16)
    for x in range(5, 96, 9):
        label[8:56, x] = (x + seed) % 6
    label[20] = 5
    return label


def outlines(seed):
    """Cells with an outline a pixel wide, whose id lies between those of the cells and the rest."""
    label = np.zeros((64, 96))
    for y in range(4, 56, 12):
        for x in range(4, 88, 12):
            label[y : y + 8 + seed % 3, x : x + 9] = 1
            label[y + 1 : y + 7 + seed % 3, x + 1 : x + 8] = 2
    return label


def cover(seed):
    """A map of the land, of single pixels here and there."""
    rng = np.random.default_rng(seed)
    label = blocks(seed, 6)
    return np.where(rng.random(label.shape) < 0.5, rng.integers(0, 6, label.shape), label)


def corners(seed):
    """Few edges, some of them between three classes."""
    label = np.zeros((64, 96))
    label[:7, :7], label[:6, :6] = 1, 2
    label[-10:, -10:] = 1
    return label


def objects(seed):
    """PASCAL VOC: a thing or two on a background, void around them."""
    label = np.zeros((64, 96))
    for k in range(4):
        y, x = 4 + 30 * (k // 2), 6 + 45 * (k % 2)
        label[y : y + 24, x : x + 35] = 255
        label[y + 2 : y + 22, x + 2 : x + 33] = 1 + (seed * 4 + k) % 20
    return label


def by_shares(known):
    share = np.array([known.get(k, 0) + 0.5 * (k == 33) for k in range(34)])
    return share / share.sum()


CLEAN = {f"{k} classes": lambda r, k=k: town(r, k) for k in (2, 3, 4, 19, 20, 27, 34, 40, 90)}
CLEAN |= {f"{k} unnamed": lambda r, k=k: town(r, k, names=None) for k in (2, 3, 19, 34)}
CLEAN |= {
    "150 classes": lambda r: town(r, 150, size=4),
    "255 classes": lambda r: town(r, 255, size=4),
    "no void": lambda r: town(r, void=False),
    "no void, unnamed": lambda r: town(r, names=None, void=False),
    "thin": lambda r: write(r, [poles(i) for i in range(6)], [f"thing {i}" for i in range(6)]),
    "outlines": lambda r: write(r, [outlines(i) for i in range(6)], ["out", "rim", "cell"], False),
    "few edges": lambda r: write(r, [corners(i) for i in range(6)], ["a", "b", "c"], False),
    "noisy": lambda r: write(r, [cover(i) for i in range(6)], None, False),
    "VOC": lambda r: write(r, [objects(i) for i in range(15)], classes.VOC),
    "VOC, unnamed": lambda r: write(r, [objects(i) for i in range(15)]),
    "ADE20K": lambda r: town(r, 150, size=4, names=classes.ADE20K),
    "field": lambda r: town(r, 3, names=["soil", "crop", "weed"], void=False),
    "a mask": lambda r: town(r, 2, void=False, share=[0.4, 0.6]),
    "34, as common": lambda r: town(r, names=None, share=by_shares({5: 20, 7: 30, 11: 20, 21: 20})),
    "34, as rare": lambda r: town(r, names=None, share=by_shares({7: 9, 11: 9, 21: 9, 4: 60})),
    "34, no street": lambda r: town(r, names=None, share=by_shares({7: 60, 11: 30, 8: 9})),
}


@pytest.mark.parametrize("kind", CLEAN)
def test_nothing_is_wrong(tmp_path, capsys, kind):
    named, out, error = check(CLEAN[kind](tmp_path / "data"), capsys)
    named -= {"never in train"} if "34, " in kind else set()
    assert not named and error is None and "no problem found" in out


def test_drawn_scenes_are_clean(tmp_path, capsys, monkeypatch):
    prepare.export_scenes(SimpleNamespace(out_dir=str(tmp_path / "s"), count=40))
    named, out, error = check(tmp_path / "s", capsys)
    assert not named and error is None
    few = {split: (first, 40) for split, (first, _) in scenes.SPLITS.items()}
    monkeypatch.setattr(scenes, "SPLITS", few)
    doctor.check(SimpleNamespace(dataset="scenes", data_dir=None))  # and as they are drawn
    assert "no problem found" in capsys.readouterr().out
    with pytest.raises(UserError, match="--data-dir has no effect on the drawn scenes"):
        doctor.check(SimpleNamespace(dataset="scenes", data_dir=str(tmp_path / "s")))


TREES = dict(
    cityscapes=test_catalog.cityscapes,
    acdc=test_catalog.acdc,
    voc2012=test_catalog.voc2012,
    ade20k=test_catalog.ade20k,
    cocostuff164k=test_catalog.cocostuff164k,
)


@pytest.mark.parametrize("name", TREES)
def test_official_trees_are_clean(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(doctor, "same_images", lambda pairs: [])  # they have few photos
    root = tmp_path / name
    TREES[name](root)
    named, out, error = check(root, capsys, name)
    assert named <= {"never in train"} and error is None
    assert ("no labels" in out) == (name == "acdc")


def test_camvids_void_is_no_class_too_many(tmp_path, capsys):
    root = write_camvid(tmp_path / "camvid", n=8)
    for path in (root / "val").iterdir():  # its photos are those of train
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    assert check(root, capsys, "camvid")[::2] == (set(), None)


def test_other_ways_of_storing_ids_are_fine(tmp_path, capsys):
    root = town(tmp_path / "data")
    labels = sorted((root / "labels").iterdir())
    Image.fromarray(np.asarray(Image.open(labels[0])).astype(np.uint16)).save(labels[0])
    palette = Image.open(labels[1]).convert("P")
    palette.putdata(np.asarray(Image.open(labels[1])).ravel().tolist())
    palette.save(labels[1])
    assert check(root, capsys)[::2] == (set(), None)
    two = town(tmp_path / "two", 2, void=False)
    relabel(two, lambda y: y > 0)  # one bit a pixel
    assert Image.open(labels[0]).mode == "I;16" and check(two, capsys)[::2] == (set(), None)


def test_what_is_found_in_one_file_is_of_no_account_elsewhere(tmp_path, capsys):
    """A val split of the rarest kind: a single class, void beside it."""
    root = town(tmp_path / "data", 2)
    relabel(root, lambda y: np.where(y == 255, 255, 0).astype(np.uint8), only=None)
    relabel(root, lambda y: np.where(np.arange(96) < 40, 1, y).astype(np.uint8), only=4)
    named, _, error = check(root, capsys)
    assert not named and error is None


# ------------------------------------------------------------------------------------------------
# values


def byte(change):
    return lambda y: change(y.astype(int)).astype(np.uint8)


up = byte(lambda y: np.where(y == 255, 255, y + 1))
street = np.array([i for _, i, _ in classes.CITYSCAPES] + [0] * 237)
shares = np.array([33, 5, 20, 1, 1, 1, 1, 1, 14, 1, 4, 1, 0.5, 6, 0.5, 0.5, 0.5, 0.5, 0.5, 7])
street_label = [street[blocks(i, 20, share=shares / shares.sum())] for i in range(6)]
grey = np.asarray(Image.fromarray(COLOURS[None]).convert("L"))[0]

VALUES = {
    "raw ids for 19": (19, byte(lambda y: np.where(y == 255, 0, street[y])), "raw street ids"),
    "raw ids for 20": (20, byte(lambda y: np.where(y == 255, 0, street[y % 19])), "raw street ids"),
    "1 to K": (11, up, "shifted"),
    "1 to K, void 0": (11, byte(lambda y: np.where(y == 255, 0, y + 1)), "one too many"),
    "19 is void": (19, byte(lambda y: np.where(y % 255 < 2, 19 * (y > 0), y)), "one too many"),
    "a stray pixel": (19, byte(lambda y: y + 22 * (np.indices(y.shape).sum(0) == 40)), "other ids"),
    "254 is void": (11, byte(lambda y: np.where(y == 3, 254, y)), "other ids"),
    "K is void": (11, byte(lambda y: np.where(y == 255, 11, y)), "one too many"),
    "-1": (11, byte(lambda y: (y - 1) % 256), "shifted down"),
    "void": (11, byte(lambda y: 0 * y + 255), "void"),
    "0 and 255": (2, byte(lambda y: np.where(y == 1, 255, 0)), "binary"),
    "other ids": (11, byte(lambda y: np.where(y == 3, 77, y)), "other ids"),
    "VOC in grey": (
        11,
        byte(lambda y: np.array([*grey_of(catalog.colours(11))] + [0] * 245)[y]),
        "grey levels",
    ),
}


def grey_of(palette):
    return np.asarray(Image.fromarray(np.uint8([palette])).convert("L"))[0]


@pytest.mark.parametrize("case", VALUES)
def test_values(tmp_path, capsys, case):
    k, change, mistake = VALUES[case]
    root = town(tmp_path / "data", k)
    relabel(root, change)
    named, out, error = check(root, capsys)
    assert named == {mistake} and "problem(s)" in error and "nan" not in out


@pytest.mark.parametrize("k, named", [(3, True), (5, True), (5, False), (14, True)])
def test_palettes_of_few_bits_lose_void(tmp_path, capsys, k, named):
    root = town(tmp_path / "data", k, names="auto" if named else None)
    for path in sorted((root / "labels").iterdir()):
        label = Image.open(path)
        label.putpalette(COLOURS[:k].ravel().tolist())
        label.save(path)
    assert check(root, capsys)[0] == {"few bits"}
    assert np.asarray(Image.open(path)).max() == (3 if k == 3 else 15)


def test_a_palette_of_each_files_own(tmp_path, capsys):
    """What saves pictures of the classes' colours with few colours, numbers them anew each time."""
    root = town(tmp_path / "data")
    relabel(root, lambda y: np.where(y == y[9, 9], 0, y).astype(np.uint8))
    for path in sorted((root / "labels").iterdir()):
        label = np.asarray(Image.open(path))
        palette = Image.fromarray(label).convert("P")
        palette.putdata(label.ravel().tolist())
        palette.putpalette(COLOURS.astype(np.uint8).ravel().tolist())
        palette.save(path)
    assert check(root, capsys)[0] == set()
    for path in (root / "labels").iterdir():
        Image.open(path).convert("RGB").quantize().save(path)
    named, _, error = check(root, capsys)
    assert named == {"palettes"} and re.search(r"the colour of \d+ is \(.*\) in p0 and \(", error)


def test_void_that_became_1(tmp_path, capsys):
    """What saves a label of 0 and 255 alone with one bit a pixel: 255 is white, and read as 1."""
    root = town(tmp_path / "data")
    relabel(root, lambda y: y > 3, only=2)
    named, _, error = check(root, capsys)
    assert named == {"one bit"} and "2 of 4 labels, such as p0, have" in error


def test_grey_levels_without_classes_txt(tmp_path, capsys):
    root = town(tmp_path / "data", names=None)
    relabel(root, VALUES["VOC in grey"][1])
    assert check(root, capsys)[0] == {"grey levels"}


def test_the_grey_levels_of_its_own_colours(tmp_path, capsys):
    names = [f"thing {k} {r} {g} {b}" for k, (r, g, b) in enumerate(COLOURS[:11])]
    root = town(tmp_path / "data", names=names)
    relabel(root, byte(lambda y: np.where(y == 255, 0, grey_of(COLOURS)[y])))
    named, out, error = check(root, capsys)
    assert named == {"grey levels"} and "grey levels of this data set's colours" in error


def test_one_too_many_tells_the_shares_of_both(tmp_path, capsys):
    root = town(tmp_path / "data", 3)
    relabel(root, byte(lambda y: np.where(np.arange(96) < 24, 3, y % 3)))
    _, out, _ = check(root, capsys)
    assert "is 3, with 25.0%" in out


@pytest.mark.parametrize("void", [0, 255])
def test_raw_street_ids_without_classes_txt(tmp_path, capsys, void):
    root = write(tmp_path / "data", street_label, void=void == 255)
    named, out, error = check(root, capsys)
    assert named == {"raw street ids"} and "road (7)" in error and "34 classes" in out


def test_raw_street_ids_that_have_names(tmp_path, capsys):
    """Somebody may want them so: a question, not an error."""
    root = write(tmp_path / "data", street_label, [f"thing {k}" for k in range(34)])
    named, _, error = check(root, capsys)
    assert named == {"raw street ids", "never in train"} and error is None


def test_ids_from_1_without_classes_txt(tmp_path, capsys):
    root = town(tmp_path / "data", names=None)
    relabel(root, up)
    named, _, error = check(root, capsys)
    assert named == {"shifted"} and "0 never occurs" in error


def test_ids_from_1_where_the_last_class_is_rare(tmp_path, capsys):
    root = town(tmp_path / "data", 10, names=[f"thing {k}" for k in range(11)])
    relabel(root, up)
    named, out, error = check(root, capsys)
    assert named == {"shifted", "never in train"} and error is None


def test_neither_the_first_nor_the_last_class(tmp_path, capsys):
    root = town(tmp_path / "data", 9, names=[f"thing {k}" for k in range(11)])
    relabel(root, up)
    assert check(root, capsys)[0] == {"never in train"}


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_void_of_zeros_between_all_things(tmp_path, capsys, unnamed):
    labels = [np.where(np.arange(96) % 8 < 2, 0, blocks(i, 10) + 1) for i in range(6)]
    for label in labels:
        label[::8] = 0
    names = None if unnamed else [f"thing {k}" for k in range(11)]
    named, _, error = check(write(tmp_path / "a", labels, names, False), capsys)
    assert named == {"void is 0"} and error is None
    assert not check(write(tmp_path / "b", labels, names, True), capsys)[0]  # 255 is void there
    if not unnamed:
        names[0] = "Background"
        assert not check(write(tmp_path / "c", labels, names, False), capsys)[0]


@pytest.mark.parametrize("name", ["void", "Unlabelled", "unlabeled", "ignore", "don't care"])
def test_void_that_is_a_class_by_its_name(tmp_path, capsys, name):
    root = town(tmp_path / "data", 3, names=[name, "a", "b"])
    named, out, error = check(root, capsys)
    assert named == {"void class"} and error is None and "perhaps: class 0" in out


def test_a_void_class_that_never_occurs_does_no_harm(tmp_path, capsys):
    root = town(tmp_path / "data", 3, names=["a", "b", "c", "void"])
    assert check(root, capsys)[0] == {"never in train"}


@pytest.mark.parametrize("unnamed", [True, False])
def test_one_class_and_255(tmp_path, capsys, unnamed):
    """Counted, it is a mask of 0 and 255; with a name, that is a question."""
    root = town(tmp_path / "data", 1, names=None if unnamed else ["thing"])
    named, _, error = check(root, capsys)
    assert named == {"binary"} and (error is not None) == unnamed


@pytest.mark.parametrize("names", [None, ["thing", "other"], ["thing"]])
def test_one_class_only(tmp_path, capsys, names):
    """A mistake, but if it is the only one that has a name: then a question."""
    root = town(tmp_path / "data", 2, names=names)
    relabel(root, np.zeros_like)
    named, _, error = check(root, capsys)
    assert "one class" in named and (error is None) == (names == ["thing"])


def test_some_labels_are_void(tmp_path, capsys):
    root = town(tmp_path / "data")
    relabel(root, lambda y: np.full_like(y, 255), only=2)
    named, out, error = check(root, capsys)
    assert named == {"void files"} and "2 of 6 labels are void all over: p0, p1" in out
    assert error is None


def test_a_class_that_train_has_not(tmp_path, capsys):
    root = town(tmp_path / "data", 4, names=[f"thing {k}" for k in range(5)])
    relabel(root, byte(lambda y: np.where(y == 2, 1, y)), only=4)
    named, out, error = check(root, capsys)
    assert named == {"never in train"} and "2 of 5 classes never occur" in out
    assert "never occur in train: thing 2, thing 4; of these" in out
    assert "val has thing 2, scored but never learnt" in out and error is None


def test_splits_of_different_classes(tmp_path, capsys):
    root = town(tmp_path / "data", 8)
    relabel(root, byte(lambda y: np.where(y == 255, 255, y % 2 + 4)))
    relabel(root, byte(lambda y: np.where(y == 255, 255, y % 4)), only=4)
    named, out, error = check(root, capsys)
    assert named == {"strangers"} and error.endswith("classes that train never has: other ids?")


def test_a_val_of_few_classes_is_no_error(tmp_path, capsys):
    root = town(tmp_path / "data", 8)
    (root / "train.txt").write_text("p1\np2")
    (root / "val.txt").write_text("p0")
    relabel(root, byte(lambda y: np.where(y == 255, 255, 0)), only=1)
    named, out, error = check(root, capsys)
    assert named == {"strangers"} and error is None
    assert "% of train's pixels are of classes that val never has" in out


# ------------------------------------------------------------------------------------------------
# interpolation


def resized(how, scale):
    def change(root, only=None):
        for folder in ("images", "labels"):
            for path in sorted((root / folder).iterdir())[:only]:
                image = Image.open(path)
                image.resize([int(scale * n) for n in image.size], how).save(path)

    return change


@pytest.mark.parametrize("how", ["BILINEAR", "BICUBIC", "LANCZOS"])
@pytest.mark.parametrize("scale", [0.7, 1.5, 2])
@pytest.mark.parametrize("names", ["auto", None])
@pytest.mark.parametrize("void", [True, False])
def test_interpolated_labels(tmp_path, capsys, how, scale, names, void):
    root = town(tmp_path / "data", names=names, void=void, size=16)
    resized(Image.Resampling[how], scale)(root)
    named, out, error = check(root, capsys)
    assert named == {"interpolated"} and "4 of 4 labels, such as p0" in error


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.5])
def test_labels_resized_with_nearest_are_fine(tmp_path, capsys, scale):
    root = town(tmp_path / "data", size=16)
    resized(Image.Resampling.NEAREST, scale)(root)
    assert check(root, capsys)[::2] == (set(), None)


@pytest.mark.parametrize("across", [True, False])
def test_interpolation_in_one_direction(tmp_path, capsys, across):
    stripes = [np.tile(blocks(i, 8)[:, :1], 96) for i in range(6)]
    root = write(tmp_path / "data", [y.T if across else y for y in stripes], void=False)
    resized(Image.Resampling.BILINEAR, 2)(root)
    assert check(root, capsys)[0] == {"interpolated"}


def test_few_classes_interpolated_in_range(tmp_path, capsys):
    root = town(tmp_path / "data", 3, void=False)
    resized(Image.Resampling.BILINEAR, 2)(root)
    assert check(root, capsys)[0] == {"interpolated"}


def test_a_mask_with_soft_edges(tmp_path, capsys):
    root = town(tmp_path / "data", 2, void=False)
    relabel(root, lambda y: 255 * y)
    resized(Image.Resampling.BILINEAR, 2)(root)
    assert check(root, capsys)[0] == {"interpolated"}


def test_one_interpolated_label_of_six(tmp_path, capsys):
    root = town(tmp_path / "data", size=16)
    resized(Image.Resampling.BILINEAR, 0.7)(root, only=1)
    named, out, error = check(root, capsys)
    assert named == {"interpolated"} and "1 of 4 labels, such as p0" in error


@pytest.mark.parametrize("of", [lambda i: blocks(i, 11), objects])
@pytest.mark.parametrize("kind", ["through JPEG", "JPEG by another name"])
def test_jpeg(tmp_path, capsys, kind, of):
    root = write(tmp_path / "data", [of(i) for i in range(6)], classes.VOC)
    for path in (root / "labels").iterdir():
        jpeg = io.BytesIO()
        Image.open(path).save(jpeg, "JPEG", quality=85)
        path.write_bytes(jpeg.getvalue())
        if kind == "through JPEG":
            Image.open(jpeg).save(path)
    named, out, error = check(root, capsys)
    assert named == {"interpolated" if kind == "through JPEG" else "jpeg"} and "originals" in error


# ------------------------------------------------------------------------------------------------
# single files


def wide(change):
    return lambda y: change(y.astype(np.uint16)).astype(np.uint16)


def panoptic(y):
    ids = np.where(y == 5, 26003, street[y])
    return np.stack([ids % 256, ids // 256, 0 * ids], 2).astype(np.uint8)


def soft_picture(y):
    image = Image.fromarray(COLOURS[y])
    return np.asarray(image.resize((50, 30), 2).resize((y.shape[1], y.shape[0]), 2))


voc = np.uint8([(0, 0, 0), *catalog.colours(255)])
own = np.vstack([COLOURS[:11], np.zeros((245, 3))]).astype(np.uint8)
FILES = {
    "palette": (lambda y: own[y], "3 channels, 12 colours"),
    "voc palette": (lambda y: voc[y % 255], "3 channels, 11 colours"),
    "colours": (lambda y: COLOURS[::-1][y], "3 channels, 12 colours"),
    "photo": (soft_picture, "3 channels"),
    "grey": (lambda y: np.stack([y] * 3, 2), "3 channels, 12 colours"),
    "panoptic picture": (panoptic, "3 channels"),
    "instances": (wide(lambda y: np.where(y == 5, 26003, street[y])), "values up to 26003"),
    "times 256": (wide(lambda y: 256 * y), "12 values up to 65280"),
    "times 257": (wide(lambda y: 257 * y), "12 values up to 65535"),
    "65535": (wide(lambda y: np.where(y == 255, 65535, y)), "12 values up to 65535"),
    "depth": (
        wide(lambda y: np.where(y == 255, 65535, 300 * y + np.arange(96))),
        "values up to 65535",
    ),
    "panoptic": (wide(lambda y: 1000 * (y % 50) + 3), "values up to"),
    "wide": (wide(lambda y: 290 + 511 * (y % 50)), "values up to"),
    "size": (lambda y: y[::2, ::2], "photo 96x64 with EXIF orientation 1, label 48x32"),
    "rotated": (lambda y: y.T.copy(), "photo 96x64 with EXIF orientation 1, label 64x96"),
}


@pytest.mark.parametrize("only", [None, 2])
@pytest.mark.parametrize("mistake", FILES)
def test_files(tmp_path, capsys, mistake, only):
    names = [f"thing {k} {r} {g} {b}" for k, (r, g, b) in enumerate(COLOURS[:11])]
    root = town(tmp_path / "data", names=names)
    change, shows = FILES[mistake]
    relabel(root, change, only)
    named, out, error = check(root, capsys)
    assert named == {mistake} and shows in out
    assert f"first: {only or 4} of 4 pairs, such as p0 (" in error
    assert error.startswith(f"{3 if only else 8} problem(s)")


def test_several_mistakes_in_files(tmp_path, capsys):
    root = town(tmp_path / "data")
    relabel(root, lambda y: np.dstack([y, np.full_like(y, 255)]), only=2)  # grey and opaque
    (root / "images/p2.png").write_bytes(b"")
    named, out, error = check(root, capsys)
    assert named == {"grey", "empty"} and "2 channels, 12 colours" in out
    assert "a label must have one channel of class ids, this one has 2" in out
    assert "2 of 4 pairs" in out and "1 of 4 pairs" in out and error.startswith("5 problem(s)")


def test_colours_without_classes_txt(tmp_path, capsys):
    """What is to count the classes does not stop the doctor."""
    root = town(tmp_path / "data", names=None)
    relabel(root, lambda y: np.dstack([voc[y], y]))
    named, out, error = check(root, capsys)
    assert named == {"voc palette"} and "4 channels, 12 colours" in out


def save_turned(path, turn, orientation):
    exif = Image.Exif()
    exif[catalog.ORIENTATION] = orientation
    image = Image.open(path)
    (image.transpose(turn) if turn is not None else image).save(path, exif=exif)


STORED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}


@pytest.mark.parametrize("orientation", STORED)
def test_photos_that_their_exif_turns(tmp_path, capsys, orientation):
    root = town(tmp_path / "data")
    for path in (root / "images").iterdir():
        save_turned(path, STORED[orientation], orientation)
    assert check(root, capsys)[::2] == (set(), None)
    relabel(root, lambda y: np.asarray(Image.fromarray(y).transpose(STORED[orientation])))
    named, out, error = check(root, capsys)
    if orientation == 3:  # the sizes agree
        assert named == {"exif by sight"} and "6 photos, such as p0" in out and error is None
    else:
        assert named == {"exif"} and "4 of 4 pairs" in error
        assert "photo 64x96 with EXIF orientation 6, label 64x96" in error


def test_one_photo_that_its_exif_turns_by_half(tmp_path, capsys):
    root = town(tmp_path / "data")
    save_turned(root / "images/p1.png", STORED[3], 3)
    relabel(root, lambda y: y[::-1, ::-1], only=2)
    relabel(root, lambda y: y[::-1, ::-1], only=1)
    named, out, error = check(root, capsys)
    assert named == {"exif by sight"} and "1 photos, such as p1," in out


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_label_is_turned_as_the_reader_turns_the_photo(tmp_path, orientation):
    label = np.random.default_rng(0).integers(0, 2, (40, 40)).astype(np.uint8) * 255
    Image.fromarray(label).save(tmp_path / "x.png")
    save_turned(tmp_path / "x.png", None, orientation)
    photo = catalog.read_image(tmp_path / "x.png")
    ours, turned = doctor.contrast_of(photo, label, orientation)
    assert (turned == 3 * 255 and ours < 0.8 * turned) if orientation > 1 else turned == 0


def test_labels_that_exif_would_turn(tmp_path, capsys):
    root = town(tmp_path / "data")
    for path in (root / "labels").iterdir():
        save_turned(path, STORED[6], 6)
    assert check(root, capsys)[0] == {"exif of label"}


BROKEN = {
    "cut off": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "no image": lambda b: b"<!doctype html><p>not found",
    "lfs": lambda b: b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("folder", ["images", "labels"])
@pytest.mark.parametrize("mistake", BROKEN)
def test_broken_files(tmp_path, capsys, mistake, folder):
    root = town(tmp_path / "data")
    path = root / folder / "p1.png"
    path.write_bytes(BROKEN[mistake](path.read_bytes()))
    named, out, error = check(root, capsys)
    assert named == {mistake} and "1 of 4 pairs, such as p1 (p1.png)" in error
    assert f"{path}: cannot be read as an image" in out


def test_links_to_nothing(tmp_path, capsys):
    root = town(tmp_path / "data")
    (root / "labels/p2.png").unlink()
    (root / "labels/p2.png").symlink_to("away")
    assert check(root, capsys)[0] == {"link"}


@pytest.mark.parametrize("limit", [2000, 5000])  # a third, and less than the 6144 pixels
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs(tmp_path, capsys, monkeypatch, limit):
    root = town(tmp_path / "data")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    named, out, error = check(root, capsys)
    assert named == {"bomb"} and "refused, too large" in out


# ------------------------------------------------------------------------------------------------
# pairs and splits


def test_the_same_photo_in_train_and_val(tmp_path, capsys):
    root = town(tmp_path / "data")
    (root / "images/p5.png").write_bytes((root / "images/p1.png").read_bytes())
    named, out, error = check(root, capsys)
    assert named == {"twins"} and "p1 is p5" in error and error.startswith("1 problem")
    (root / "val.txt").write_text("p1\np4")
    named, out, error = check(root, capsys)
    assert not named and "1 images are in train and in val: p1" in error  # that is not said twice
    (root / "val.txt").write_text("p4\np4")
    named, out, error = check(root, capsys)
    assert not named and "1 images are in val more than once: p4" in error
    (root / "test.txt").write_text("p3\np2")
    assert "2 images are in train and in test: p2" in check(root, capsys)[1]
    (root / "test.txt").unlink()
    (root / "unlabelled.txt").write_text("p2")
    assert check(root, capsys)[2].startswith("1 problem")  # once, whatever is compared with val
    Image.open(root / "images/p2.png").save(root / "images/p2.jpg")
    assert "images: p2.jpg and p2.png have the same stem" in check(root, capsys)[2]


@pytest.mark.parametrize(
    "name, words",
    [
        ("p1.jpg", r"the labels in .*labels are JPEG, which destroys class ids"),
        ("p1_mask.png", r"labels has p1_mask.png, where p1.png is looked for"),
        ("p1.tif", r"labels has p1.tif, where p1.png is looked for"),
        ("p11.png", r"have no label: p1$"),
    ],
)
def test_labels_by_other_names(tmp_path, capsys, name, words):
    root = town(tmp_path / "data")
    Image.open(root / "labels/p1.png").save(root / "labels" / name)
    (root / "labels/p1.png").unlink()
    assert re.search(words, check(root, capsys)[2])


def test_camvid_with_jpeg_labels(tmp_path, capsys):
    root = write_camvid(tmp_path / "camvid")
    for path in (root / "trainannot").iterdir():
        path.rename(path.with_suffix(".jpg"))
    assert "have no label" in check(root, capsys, "camvid")[2]
    assert "JPEG, which destroys" in check(root, capsys, "camvid")[2]


def test_withheld_labels_are_no_mistake(tmp_path, capsys, monkeypatch):
    root = town(tmp_path / "data")
    dataset = catalog.open_dataset("folder", root)
    dataset.pairs["test"] = [(s, image, None) for s, image, _ in dataset.pairs["val"]]
    monkeypatch.setattr(catalog, "open_dataset", lambda *a, **kw: dataset)
    named, out, error = check(root, capsys)
    assert not named and error is None and out.count("no labels") == 1


def test_mistakes_in_val_alone_are_found(tmp_path, capsys):
    root = town(tmp_path / "data")
    good = [path.read_bytes() for path in sorted((root / "labels").iterdir())]
    relabel(root, up)
    for i in range(4):
        (root / "labels" / f"p{i}.png").write_bytes(good[i])
    named, out, error = check(root, capsys)
    assert named == {"shifted"} and out.index("shifted") > out.index("val: 2 images")


# ------------------------------------------------------------------------------------------------
# what is printed


def test_sizes_and_shares(folder, capsys):
    named, out, error = check(folder, capsys)
    assert not named and error is None and "no problem found" in out
    assert "train: 6 images, 1 size(s): 48x40" in out
    (share,) = [line for line in out.splitlines() if "(ignored)" in line][:1]
    assert f"{100 / 48:.2f} %" in share and f"{6 * 40} px" in share


def test_files_in_no_split(folder, capsys):
    (folder / "labels" / "p0.png").rename(folder / "labels" / "other.png")
    (folder / "train.txt").write_text("p1\np2\n")
    _, out, error = check(folder, capsys)
    assert "4 files in images/ are in no split: p0, p3, p4, p5" in out and error is None
    assert "4 files in labels/ are in no split: other, p3, p4, p5" in out


def test_weights_of_the_paper_beside_the_classes_of_train(tmp_path, capsys):
    root = town(tmp_path / "data", 3)
    relabel(root, byte(lambda y: np.where((y == 2) & (np.arange(96) > 20), 0, y)))
    _, out, _ = check(root, capsys)
    train, val = out.split("val: 2 images")
    told = [float(w) for w in re.findall(r"  paper's weight +(\d+\.\d\d)$", train, re.M)]
    pixels = [int(n) for n in re.findall(r"  (\d+) px", train)][:3]
    assert told == pytest.approx([1 / np.log(1.1 + n / sum(pixels)) for n in pixels], abs=0.006)
    dataset = catalog.open_dataset("folder", root)
    split = data.Files(dataset.pairs["train"], dataset.table)
    assert told == pytest.approx(data.class_weights(split, 3).tolist(), abs=0.006)
    assert len(set(told)) == 3 and "weight" not in val


def test_exit_code(tmp_path):
    root = town(tmp_path / "data", 2)
    relabel(root, up)
    argv = ["data.py", "check", "--dataset", "folder", "--data-dir", str(root)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    place = Path(data.__file__).parent
    done = subprocess.run(
        [sys.executable, *argv], cwd=place, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and "  likely: labels run from 1 to 2" in done.stdout
    assert done.stderr.startswith("error: 8 problem(s) in ") and done.stderr.count("\n") == 1


def test_photos_without_labels(tmp_path, capsys):
    """Those of unlabelled.txt are read and are no mistake; without classes.txt none counts."""
    root = write_folder(tmp_path / "d")
    stems = (root / "train.txt").read_text().splitlines()
    (root / "train.txt").write_text("\n".join(stems[:4]))
    (root / "unlabelled.txt").write_text("\n".join(stems[4:]))
    for stem in stems[4:]:
        (root / "labels" / f"{stem}.png").unlink()
    (root / "classes.txt").unlink()
    _, out, error = check(root, capsys)
    assert error is None and "unlabelled: 2 images" in out and "  no labels" in out
    assert "are in no split" not in out
    (root / "images" / f"{stems[5]}.png").unlink()
    assert f"unlabelled.txt: 1 of 2 have no image: {stems[5]}" in check(root, capsys)[2]
    (root / "unlabelled.txt").write_text((root / "val.txt").read_text())
    assert "3 images are in unlabelled and in val: p6 ..." in check(root, capsys)[2]
