"""
The label doctor: what is in a data set, and what is wrong with it, in words.
"""

from pathlib import Path

import numpy as np

from catalog import files_in, in_parallel, open_dataset, read_label, read_pair
from distill import IGNORE
from files import UserError


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
