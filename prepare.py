"""
Data sets written or fetched.
"""

from pathlib import Path

from PIL import Image

import scenes
from files import UserError


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
