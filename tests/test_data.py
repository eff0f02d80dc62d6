"""Layouts, the label table, the cache, few labels."""

import dataclasses
import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import picture, write_folder
from PIL import Image

import catalog
import data
import prepare
import scenes
from files import UserError


def write_camvid(root, n=3):
    for split in ("train", "val"):
        for kind in (split, f"{split}annot"):
            (root / kind).mkdir(parents=True)
        for i in range(n):
            image, label = picture(i, classes=11)
            label[:, -2:] = 11
            Image.fromarray(image).save(root / split / f"0001TP_{i}.jpg", quality=95)
            Image.fromarray(label).save(root / f"{split}annot" / f"0001TP_{i}.png")
    return root


# ------------------------------------------------------------------------------------------------
# layouts and labels


def test_folder(folder):
    dataset = catalog.open_dataset("folder", folder)
    assert dataset.classes == ("thing 0", "thing 1", "thing 2")
    assert {k: len(v) for k, v in dataset.pairs.items()} == {"train": 6, "val": 3}
    image, label = catalog.read_pair(dataset.pairs["train"][2], dataset.table)
    want_image, want_label = picture(2)
    assert np.array_equal(image, want_image) and np.array_equal(label[:, 1:], want_label[:, 1:])
    assert (label[:, 0] == 255).all()


def test_photos_of_a_folder_may_be_of_other_kinds(folder):
    pixels = catalog.read_image(folder / "images/p1.png")
    for k, suffix in enumerate(("webp", "bmp", "tif", "TIFF")):
        path = folder / f"images/p{k}.png"
        Image.fromarray(catalog.read_image(path)).save(path.with_suffix(f".{suffix}"))
        path.unlink()
    dataset = catalog.open_dataset("folder", folder)
    pairs = dataset.pairs["train"][:4]
    assert [image.suffix for _, image, _ in pairs] == [".webp", ".bmp", ".tif", ".TIFF"]
    assert np.array_equal(catalog.read_pair(pairs[1], dataset.table)[0], pixels)


def test_classes_txt_with_colours(folder):
    (folder / "classes.txt").write_text("traffic light 1 2 3\nroad\nlane 2, 9, 8, 7\n")
    dataset = catalog.open_dataset("folder", folder)
    assert dataset.classes == ("traffic light", "road", "lane 2")
    assert dataset.palette[0] == (1, 2, 3) and dataset.palette[2] == (9, 8, 7)


def test_classes_are_counted_without_classes_txt(folder):
    (folder / "classes.txt").unlink()
    assert catalog.open_dataset("folder", folder).classes == ("class 0", "class 1", "class 2")


def test_camvid_void_is_ignored(tmp_path):
    dataset = catalog.open_dataset("camvid", write_camvid(tmp_path / "camvid"))
    assert len(dataset.classes) == 11 and dataset.classes[10] == "bicyclist"
    _, label = catalog.read_pair(dataset.pairs["val"][0], dataset.table)
    assert (label[:, -2:] == 255).all() and set(np.unique(label)) <= {*range(11), 255}


def test_nyuv2_has_40_classes_and_void_is_not_the_first(tmp_path):
    root = write_folder(tmp_path / "nyu", classes=40)
    (root / "classes.txt").unlink()
    dataset = catalog.open_dataset("nyuv2", root)
    assert len(dataset.classes) == 40 and dataset.classes[19] == "floor mat"
    _, label = catalog.read_pair(dataset.pairs["train"][0], dataset.table)
    assert (label[:, 0] == 255).all()


def test_palette_images_are_read_as_indices(folder):
    path = folder / "labels" / "p0.png"
    label = np.asarray(Image.open(path))
    p = Image.fromarray(label).convert("P")
    p.putpalette([7, 7, 7, 200, 100, 0] * 128)
    p.putdata(label.ravel().tolist())
    p.save(path)
    assert np.array_equal(catalog.read_label(path), label)


def test_colours_are_distinct_and_voc():
    colours = catalog.colours(255)
    assert len(set(colours)) == 255 and colours[0] == (128, 0, 0) and colours[2] == (128, 128, 0)


def test_exif_orientation_is_respected(folder):
    image, _ = picture(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x0128] = 6, 2
    whole = exif.tobytes()
    odd = whole.replace(b"\x01\x28\x00\x03", b"\x01\x28\x00\x04")  # Pillow cannot write it again
    turned = Image.fromarray(np.rot90(image, 1))  # stored on its side
    for exif in (whole, odd):
        turned.save(folder / "images" / "p0.png", exif=exif)
        assert np.array_equal(catalog.read_image(folder / "images" / "p0.png"), image)


def test_photos_of_16_bits_are_refused(folder):
    path = folder / "images" / "p0.png"
    Image.fromarray(np.full((40, 48), 60000, np.uint16)).save(path)
    with pytest.raises(UserError, match="photos must have 8 bits per channel"):
        catalog.read_image(path)


def test_scenes_are_deterministic_and_cover_their_classes():
    a, b = scenes.draw(5), scenes.draw(5)
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    assert not np.array_equal(a[1], scenes.draw(6)[1])
    found = np.unique(np.concatenate([scenes.draw(i)[1].ravel() for i in range(60)]))
    assert found.tolist() == [*range(11), 255]
    dataset = catalog.open_dataset("scenes")
    assert not set(dataset.pairs["train"]) & set(dataset.pairs["val"])


def test_exported_scenes_are_a_folder(tmp_path):
    prepare.export_scenes(SimpleNamespace(out_dir=str(tmp_path / "s"), count=3))
    dataset = catalog.open_dataset("folder", tmp_path / "s")
    assert dataset.classes == tuple(name for name, _ in scenes.CLASSES)
    image, label = catalog.read_pair(dataset.pairs["val"][1], dataset.table)
    want = scenes.draw(int(dataset.pairs["val"][1][0]))
    assert np.array_equal(image, want[0]) and np.array_equal(label, want[1])


# ------------------------------------------------------------------------------------------------
# the cache


def contents(split):
    return [(split.image(i).tobytes(), split.label(i).tobytes()) for i in range(len(split))]


def test_cache_holds_what_the_files_hold(folder, tmp_path):
    image, label = picture(77, 37, 91)  # sizes may differ
    Image.fromarray(image).save(folder / "images" / "p1.png")
    Image.fromarray(label).save(folder / "labels" / "p1.png")
    dataset = catalog.open_dataset("folder", folder)
    cached = data.open_split(dataset, "train", folder)
    assert isinstance(cached, data.Packed) and list((folder / ".cache").iterdir())
    files = data.open_split(dataset, "train", folder, cache="off")
    assert isinstance(files, data.Files) and contents(cached) == contents(files)
    elsewhere = data.open_split(dataset, "train", folder, cache_dir=tmp_path / "c")
    assert contents(elsewhere) == contents(files) and list((tmp_path / "c").iterdir())


@pytest.mark.parametrize("cache", ["on", "off"])
def test_workers_that_are_no_forks_open_the_cache_again(folder, cache):
    dataset = catalog.open_dataset("folder", folder)
    split = data.open_split(dataset, "train", folder, cache=cache)
    pickled = pickle.dumps(split)
    assert len(pickled) < 5000 < sum(split.image(i).nbytes for i in range(len(split)))
    assert contents(pickle.loads(pickled)) == contents(split)


def test_a_shorter_side_in_cache_and_files(folder):
    """Images as in scoring, labels by nearest; a cache of its own; images alone are the same."""
    image, label = picture(77, 120, 91)
    Image.fromarray(image).save(folder / "images" / "p1.png")
    Image.fromarray(label).save(folder / "labels" / "p1.png")
    dataset = catalog.open_dataset("folder", folder)
    plain = data.open_split(dataset, "train", folder)
    split = data.open_split(dataset, "train", folder, short_side=50)
    assert len(list((folder / ".cache").iterdir())) == 2 and isinstance(split, data.Packed)
    files = data.open_split(dataset, "train", folder, cache="off", short_side=50)
    assert contents(split) == contents(files) != contents(plain)
    assert [files.pair(i)[0].tobytes() for i in range(6)] == [i for i, _ in contents(split)]
    assert split.image(1).shape == (65, 50, 3) and split.image(0).shape == (50, 60, 3)
    whole = np.asarray(Image.fromarray(image).resize((50, 65), Image.BILINEAR))
    assert np.array_equal(split.image(1), whole)
    middles = [((np.arange(n) + 0.5) * m / n).astype(int) for n, m in ((65, 120), (50, 91))]
    assert np.array_equal(split.label(1), label[np.ix_(*middles)])


def test_an_index_that_points_elsewhere_is_a_damaged_cache(folder):
    dataset = catalog.open_dataset("folder", folder)
    data.open_split(dataset, "train", folder)
    (path,) = folder.glob(".cache/*/index.npy")
    index = np.load(path)
    index[1, 2] += 10**9
    np.save(path, index)
    with pytest.raises(UserError, match="a damaged cache; remove this folder"):
        data.open_split(dataset, "train", folder)


def test_a_cache_larger_than_the_memory_limit_is_not_called_damaged(folder, monkeypatch):
    dataset = catalog.open_dataset("folder", folder)
    data.open_split(dataset, "train", folder)

    def full(*args):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(np, "memmap", full)
    with pytest.raises(UserError, match="too large for this process's memory limit"):
        data.open_split(dataset, "train", folder)


@pytest.mark.parametrize("name, size", [("index.npy", 0), ("images.bin", 100), ("labels.bin", 0)])
def test_a_damaged_cache_is_named(folder, name, size):
    dataset = catalog.open_dataset("folder", folder)
    want = contents(data.open_split(dataset, "train", folder))
    (cache,) = (folder / ".cache").iterdir()
    os.truncate(cache / name, size)
    with pytest.raises(UserError, match=f"{cache.name}: a damaged cache; remove this folder"):
        data.open_split(dataset, "train", folder)
    shutil.rmtree(cache)
    assert contents(data.open_split(dataset, "train", folder)) == want


def test_cache_is_built_once_and_anew_when_a_file_changes(folder, monkeypatch, capsys):
    dataset = catalog.open_dataset("folder", folder)
    first = data.open_split(dataset, "train", folder)
    (old,) = (folder / ".cache").iterdir()
    data.open_split(dataset, "val", folder)
    assert "beside it" not in capsys.readouterr().out
    monkeypatch.setattr(data, "decode", None)  # to build again would fail
    data.open_split(dataset, "train", folder)
    monkeypatch.undo()
    image, label = picture(99)
    Image.fromarray(image).save(folder / "images" / "p3.png")
    Image.fromarray(label).save(folder / "labels" / "p3.png")
    again = data.open_split(catalog.open_dataset("folder", folder), "train", folder)
    assert np.array_equal(again.image(3), image) and not np.array_equal(first.image(3), image)
    assert f"beside it, of other files or settings: {old.name}\n" in capsys.readouterr().out


def test_cache_too_large_is_not_built(folder, capsys):
    dataset = catalog.open_dataset("folder", folder)
    split = data.open_split(dataset, "train", folder, cache_gb=1e-6)
    assert isinstance(split, data.Files)
    assert "no cache, the files are read by worker processes" in capsys.readouterr().out


@pytest.mark.parametrize("room, kind", [(1.9, data.Files), (2.1, data.Packed)])
def test_a_cache_takes_half_of_the_free_disk(folder, monkeypatch, room, kind):
    dataset = catalog.open_dataset("folder", folder)
    files = data.open_split(dataset, "train", cache="off")
    need = sum(part.nbytes for i in range(len(files)) for part in files.pair(i))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=room * need))
    assert type(data.open_split(dataset, "train", folder)) is kind


def test_folders_of_one_name_do_not_share_a_cache(folder, tmp_path, monkeypatch):
    """Named relative to where the command is run, their files of one size and time."""
    other = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, other)  # which keeps times
    keys = []
    for place in (folder, other):
        monkeypatch.chdir(place.parent)
        dataset = catalog.open_dataset("folder", place.name)
        keys.append(data.cache_key(dataset, dataset.pairs["train"]))
    assert keys[0] != keys[1]


@pytest.mark.parametrize("hashed", ["cache_key", "fingerprint"])
def test_what_is_cached_or_resumed_is_known_by_its_files_and_classes(folder, hashed):
    """But a copy is the same to --resume."""

    def key(dataset):
        what = dataset.pairs["train"] if hashed == "cache_key" else ["train"]
        return getattr(data, hashed)(dataset, what)

    dataset = catalog.open_dataset("folder", folder)
    before = key(dataset)
    assert key(dataclasses.replace(dataset, table=dataset.table[::-1].copy())) != before
    pairs = dataset.pairs["train"]
    os.utime(pairs[3][2], (7, 7))
    assert (key(dataset) == before) == (hashed == "fingerprint")
    with open(pairs[3][1], "ab") as f:
        f.write(b" ")
    other = key(dataset)
    assert other != before
    for path in pairs[4][1:]:
        path.rename(path.with_name("q4.png"))
    (folder / "train.txt").write_text("p0\np1\np2\np3\nq4\np5")
    assert key(catalog.open_dataset("folder", folder)) != other


def test_read_only_data_is_cached_in_the_home(folder, tmp_path, monkeypatch):
    (folder / ".cache").write_text("a file: no folder can be made here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    split = data.open_split(catalog.open_dataset("folder", folder), "val", folder)
    assert isinstance(split, data.Packed) and list((tmp_path / "home/.cache").rglob("images.bin"))
    with pytest.raises(UserError, match="--cache off"):
        data.cache_folder(folder, folder / ".cache", "a name")
    assert not list((tmp_path / "home/.cache").rglob("tmp*"))


def test_a_cache_on_a_read_only_disk_is_used(folder, tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    dataset = catalog.open_dataset("folder", folder)
    data.open_split(dataset, "train", folder)
    monkeypatch.setattr(data.tempfile, "TemporaryFile", refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for cache_dir in (None, folder / ".cache"):
        split = data.open_split(dataset, "train", folder, cache_dir=cache_dir)
        assert isinstance(split, data.Packed)
    assert not (tmp_path / "home").exists()


def test_processes_of_one_number_do_not_share_a_build(folder, monkeypatch):
    """In containers that share a disk numbers are small, and the same."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    dataset = catalog.open_dataset("folder", folder)
    key = data.cache_key(dataset, dataset.pairs["train"])
    other = folder / f".cache/folder-train-{key}.tmp7"
    other.mkdir(parents=True)
    assert isinstance(data.open_split(dataset, "train", folder), data.Packed) and other.exists()


def test_two_who_build_one_cache(folder, monkeypatch):
    dataset, real = catalog.open_dataset("folder", folder), data.decode

    def slower(*a):
        monkeypatch.undo()
        data.open_split(dataset, "train", folder)  # another process
        return real(*a)

    monkeypatch.setattr(data, "decode", slower)
    split = data.open_split(dataset, "train", folder)
    assert contents(split) == contents(data.open_split(dataset, "train", cache="off"))
    assert len(list((folder / ".cache").iterdir())) == 1


def test_a_build_that_takes_long_is_not_stale(folder, tmp_path):
    split = data.open_split(catalog.open_dataset("folder", folder), "train", cache="off")
    place = tmp_path / f"x-{16 * '0'}.tmp1"
    place.mkdir()

    class Slow(data.Files):
        def pair(self, i):
            os.utime(place, (0, 0))
            return super().pair(i)

    data.decode(Slow(split.pairs, split.table), place, "x")
    data.remove_stale_builds(tmp_path)
    assert place.exists()


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
import catalog, data
read = catalog.read_pair
def slow(*a):
    time.sleep(0.2)
    return read(*a)
data.read_pair = slow
print("building", flush=True)
data.open_split(catalog.open_dataset("folder", {folder!r}), "train", {folder!r})
"""


def test_kill_during_the_build_leaves_nothing_half_done(tmp_path):
    folder = write_folder(tmp_path / "data", train=70)
    root = str(Path(data.__file__).parent)
    code = KILLED.format(root=root, folder=str(folder))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    cache = folder / ".cache"
    while not list(cache.glob("*.tmp*/images.bin")) and child.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (half,) = cache.iterdir()
    assert ".tmp" in half.name
    dataset = catalog.open_dataset("folder", folder)
    cached = data.open_split(dataset, "train", folder)
    assert contents(cached) == contents(data.open_split(dataset, "train", folder, cache="off"))
    assert half.exists()  # somebody may be at work
    (cache / "mine.tmp1").mkdir()
    for path in cache.iterdir():
        os.utime(path, (0, 0))
    data.open_split(dataset, "train", folder)
    assert not half.exists() and (cache / "mine.tmp1").exists()


def test_failed_build_cleans_up(tmp_path):
    folder = write_folder(tmp_path / "data", train=70)
    (folder / "images" / "p1.png").write_bytes(b"not an image")  # not of those whose size is asked
    with pytest.raises(UserError, match=r"p1.png: cannot be read as an image"):
        data.open_split(catalog.open_dataset("folder", folder), "train", folder)
    assert not list((folder / ".cache").iterdir())


def test_no_space_left(folder, monkeypatch):
    def full(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.np, "save", full)
    with pytest.raises(UserError, match="cannot build the cache .No space left"):
        data.open_split(catalog.open_dataset("folder", folder), "train", folder)
    assert not list((folder / ".cache").iterdir())


# ------------------------------------------------------------------------------------------------
# few labels


def test_short_side_is_the_usual_one():
    sizes = np.array([(50, 40), (64, 96), (70, 64), (64, 64), (300, 200)])
    split = data.Packed(np.zeros(3 * sizes.prod(1).sum(), np.uint8), None, data.index_of(sizes))
    assert data.short_side(split) == 64


@pytest.mark.parametrize("only", [0, 1])
def test_labels_that_are_rare_are_found(only, capsys):
    """All are read if those of a sample show one class, or none."""
    label = np.full((40, 2, 2), 255, np.uint8)
    label[::2] = 0 if only else 255
    split = data.Packed(np.zeros(480, np.uint8), label.reshape(-1), data.index_of(40 * [(2, 2)]))
    (rare, *_) = set(range(40)) - {*data.some_of(split)}
    label[rare, 0] = 0, 1
    data.check_labels(split, ["a", "b"], "photos")
    assert not capsys.readouterr().out


def test_few_labels():
    """Those that a subset would take keep their labels and come first, the rest are ignored."""
    dataset = catalog.open_dataset("scenes")
    whole = data.open_split(dataset, "val")
    split, others = data.subset(whole, 9), data.subset(data.open_split(dataset, "train"), 2)
    few, taken = data.few_labels(split, 3, others), data.subset(split, 3)
    assert len(few) == 11 and few.labelled == 3
    at = [i for _, i in few.places]
    assert at[:3] == [0, 4, 8] and sorted(at[:9]) == list(range(9)) and at[9:] == [0, 1]
    for i in range(11):
        image, label = few.pair(i)
        assert np.array_equal(image, split.image(at[i]) if i < 9 else others.image(at[i]))
        if i < 3:
            assert np.array_equal(label, taken.label(i)) and (label != 255).any()
        else:
            assert label.shape == image.shape[:2] and (label == 255).all()
    pixels = data.class_pixels(few)
    assert (pixels[:255] == data.class_pixels(taken)[:255]).all()  # for the weights of classes
    with pytest.raises(UserError, match="10 images of a split that has 9"):
        data.few_labels(split, 10)
    everything = data.few_labels(split, 9)
    assert [i for _, i in everything.places] == list(range(9)) and everything.labelled == 9
