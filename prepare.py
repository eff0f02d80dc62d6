"""
Writes data sets: the drawn scenes, downloads, NYUv2 from its MATLAB files.
"""

import importlib
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

import downloads
import scenes
from catalog import DATASETS, in_parallel, open_dataset, read_mat
from classes import NYU13, NYU40, NYU40_TO_13, NYU_CLASS_38, NYU_CLASS_39, NYU_CLASSES_1_TO_37
from distill import IGNORE
from files import Progress, UserError, atomic, beside, write_text
from sources import SOURCES, how_to_get, is_free


def export_scenes(args):
    """python data.py scenes: the drawn scenes as files, an example of the folder layout."""
    root = Path(args.out_dir).resolve()
    if args.count < 1:
        raise UserError("--count must be at least 1")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{args.out_dir}: not empty; pass a new folder as --out-dir")
    if root == Path.cwd():
        raise UserError(f"{args.out_dir}: it would be replaced; pass a new folder as --out-dir")
    tmp = Path(beside(root))  # renamed when complete
    try:
        for folder in ("images", "labels"):
            (tmp / folder).mkdir(parents=True)
        lines = [f"{name} {r} {g} {b}" for name, (r, g, b) in scenes.CLASSES]
        (tmp / "classes.txt").write_text("\n".join(lines) + "\n")
        for split, (first, n) in scenes.SPLITS.items():
            write_scenes(tmp, split, range(first, first + min(n, args.count)))
        os.replace(tmp, root)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    print(f"{args.out_dir}: written, in the layout of --dataset folder")


def write_scenes(root, split, numbers):
    """Write a split's images, labels and list."""
    progress, stems = Progress(f"drawing {split}", len(numbers)), []
    for number in numbers:
        progress.at(len(stems))
        stems.append(f"{number:07d}")
        image, label = scenes.draw(number)
        Image.fromarray(image).save(root / "images" / f"{stems[-1]}.png")
        if split != "unlabelled":
            Image.fromarray(label).save(root / "labels" / f"{stems[-1]}.png")
    (root / f"{split}.txt").write_text("\n".join(stems) + "\n")


# ------------------------------------------------------------------------------------------------
# download


def download(args):
    """python data.py download NAME: fetch what has a url, ready for --dataset NAME."""
    name, root = args.name, Path(args.data_dir)
    if name not in SOURCES:
        raise UserError(f"there is nothing to download for '{name}': {', '.join(SOURCES)}")
    source = SOURCES[name]
    if not is_free(name):
        raise UserError(f"{name} is not downloaded by this program: {how_to_get(name, root)}")
    print(f"{name}: {source['licence']}; see {source['page']}", flush=True)
    if name == "nyuv2":
        for module in ("h5py", "scipy.io"):  # before gigabytes are fetched
            need(module)
    if (root / source["last"]).exists():
        try:
            DATASETS[name](root)
        except UserError as e:
            what = f"{root / source['last']} is there, but not all of {name}"
            raise UserError(f"{what} ({e}): remove it, and it is downloaded again") from e
        print(f"{root / source['last']} is there already: nothing to do")
        return
    archives = [root / file["name"] for file in source["files"]]
    for path, file in zip(archives, source["files"]):
        downloads.download(file["url"], path, *(file.get(k) for k in ("size", "sha256", "md5")))
    if name == "nyuv2":
        write_nyuv2(*archives, None, 40, root)
    else:
        only, where = source["unpack"]
        downloads.unpack(archives[0], root / where, only)
    if not (root / source["last"]).exists():
        raise UserError(f"{archives[0]}: unpacked, but without {source['last']}: another file?")
    print_summary(name, root)
    if not args.keep_archive:
        for path in archives:
            path.unlink()


def print_summary(name, root):
    """The splits as the data set's reader finds them, and the next command."""
    pairs = open_dataset(name, root).pairs
    print(f"{root}: " + ", ".join(f"{len(v)} {split}" for split, v in pairs.items()) + " images")
    print(f"next: python data.py check --dataset {name} --data-dir {root}")


def need(module):
    """Import a package that only the NYUv2 files need."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"NYUv2 comes as MATLAB files ({e}): pip install h5py scipy") from e


# ------------------------------------------------------------------------------------------------
# NYU Depth v2


def convert_nyuv2(args):
    """python data.py nyuv2: convert the original MATLAB files to the folder layout."""
    root = Path(args.out_dir)
    write_nyuv2(args.mat, args.splits, args.map, args.classes, root)
    print_summary("nyuv2", root)


def write_nyuv2(mat, splits, class_map, num_classes, root):
    """Write images/NNNN.png and labels/NNNN.png, NNNN from 1 as in the release; test becomes val.

    Existing pictures are kept, so that an interrupted run resumes; the lists are written last.
    num_classes: 40 or 13. Raises UserError that names the file, what it holds and what it should.
    """
    h5py, table = need("h5py"), nyu_table(class_map, num_classes)
    if not Path(mat).is_file():
        raise UserError(f"{mat}: no such file")
    try:
        source = h5py.File(mat, "r")
    except OSError as e:
        raise UserError(f"{mat}: not a whole HDF5 file, as MATLAB v7.3 writes it ({e})") from e
    with source:
        images, labels = nyu_arrays(source, mat)
        lists = nyu_splits(splits, len(images))
        declare_classes(root, NYU13 if num_classes == 13 else NYU40)

        def write(number):
            paths = [root / folder / f"{number:04d}.png" for folder in ("images", "labels")]
            if all(path.exists() for path in paths):
                return
            try:  # MATLAB's (height, width, 3, N) is (N, 3, width, height) in h5py
                image, raw = images[number - 1].transpose(2, 1, 0), labels[number - 1].T
            except OSError as e:
                raise UserError(f"{mat}: image {number} cannot be read ({e})") from e
            if raw.max() >= len(table):
                raise UserError(f"{mat}: label {raw.max()} in image {number}, 0 to 894 expected")
            for path, pixels in zip(paths, (image, table[raw])):
                with atomic(path) as tmp:
                    Image.fromarray(np.ascontiguousarray(pixels)).save(tmp, format="PNG")

        for _ in in_parallel(write, sorted(sum(lists.values(), [])), "nyuv2"):
            pass
    for name, numbers in lists.items():
        write_text(root / f"{name}.txt", "".join(f"{number:04d}\n" for number in numbers))


def nyu_arrays(source, mat):
    """The images (N, 3, W, H) and labels (N, W, H) of the open file; nothing is read yet."""
    arrays = [source.get(name) for name in ("images", "labels")]
    found = [f"{x.shape} {x.dtype}" if hasattr(x, "shape") else "no array" for x in arrays]
    shape = getattr(arrays[0], "shape", ())
    fits = found == [f"{shape} uint8", f"{(*shape[:1], *shape[2:])} uint16"]
    if len(shape) != 4 or shape[1] != 3 or not fits:
        want = "expected (N, 3, 640, 480) uint8 and (N, 640, 480) uint16"
        raise UserError(f"{mat}: images {found[0]}, labels {found[1]}; {want}")
    return arrays


def nyu_splits(path, n):
    """{"train": [number], "val": [number]}, from 1 to n; val is the official test split."""
    train, test = read_mat(path, "trainNdxs", "testNdxs")
    lists = {"train": train.ravel().tolist(), "val": test.ravel().tolist()}
    both = lists["train"] + lists["val"]
    outside = [i for i in both if not 1 <= i <= n]
    if outside or not all(lists.values()):
        some = ", ".join(map(str, outside[:3])) or "an empty split"
        raise UserError(f"{path}: {some}, expected numbers from 1 to {n}, the images there are")
    if len(set(both)) < len(both):
        twice = sorted(i for i in set(both) if both.count(i) > 1)
        raise UserError(
            f"{path}: {len(twice)} image(s) listed twice, such as {twice[0]}, expected once"
        )
    return lists


def nyu_table(path, num_classes):
    """(895,) uint8: raw label (0 is void) -> 0..num_classes-1 or IGNORE. path: --map, or None."""
    if path:
        found = read_mat(path, "mapClass")[0].ravel()
    else:
        found = np.full(894, 40)
        lists = (NYU_CLASSES_1_TO_37, range(1, 38)), (NYU_CLASS_38, 38), (NYU_CLASS_39, 39)
        for raw, k in lists:
            found[np.array(raw.split(), int) - 1] = k
    if len(found) != 894 or found.min() < 1 or found.max() > 40:
        held = f"{len(found)} numbers" + (f" {found.min()} to {found.max()}" if len(found) else "")
        raise UserError(f"{path}: mapClass holds {held}, expected 894 of 1 to 40")
    classes = np.array(NYU40_TO_13)[found - 1] if num_classes == 13 else found
    return np.append(IGNORE, classes - 1).astype(np.uint8)


def declare_classes(root, names):
    """Write classes.txt; UserError if the folder holds labels of other classes already."""
    path, text = root / "classes.txt", "".join(f"{name}\n" for name in names)
    begun = any((root / folder).is_dir() for folder in ("images", "labels"))
    if begun and not (path.exists() and path.read_text() == text):
        raise UserError(f"{root}: images/ or labels/ of other classes are there; pass a new folder")
    write_text(path, text)
