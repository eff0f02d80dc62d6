"""
Score a checkpoint on a data set, or label your own photos with it.

    python eval.py --ckpt out/student.pt --dataset camvid --data-dir D
    python eval.py --ckpt out/student.pt --dataset camvid --data-dir D --scales 0.75 1 1.25 --flip
    python eval.py --ckpt out/student.pt --image photo.jpg --out-dir labelled

mIoU is the mean of intersection / union over the classes that occur in labels or predictions, from
one confusion matrix of all pixels that are not IGNORE.
"""

import argparse
import contextlib
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import catalog
import data
import files
import model
import parallel
from augment import normalise
from distill import IGNORE
from files import UserError
from nets import resize

AT_ONCE = 2**26  # full-size logits that `predict_ids` holds at a time

# ------------------------------------------------------------------------------------------------
# metrics


def confusion(prediction, label, num_classes):
    """(K, K) int64: rows are labels (integer, any shape), columns predictions; no IGNORE."""
    prediction, label = prediction.flatten().long(), label.flatten().long()
    valid = label != IGNORE
    cells = label[valid] * num_classes + prediction[valid]
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def boundary(labels, d):
    """(B, H, W) bool: within d (a square of side 2d + 1) of another label or the image's edge.

    This is the mask of class k minus its erosion, for all k at once (Cheng et al., CVPR 2021): the
    pixels of the square are all equal iff no two neighbours in it differ, and a summed-area table
    counts those that do at a cost independent of d.
    """
    x = F.pad(labels.int(), (d, d, d, d), value=-1)  # (B, H + 2d, W + 2d)
    across = box_sum(x[:, :, 1:] != x[:, :, :-1], 2 * d + 1, 2 * d)  # (B, H, W)
    down = box_sum(x[:, 1:] != x[:, :-1], 2 * d, 2 * d + 1)
    return across + down > 0


def box_sum(x, h, w):
    """Sums over all h x w boxes of (B, H, W): (B, H - h + 1, W - w + 1)."""
    s = F.pad(x.int().cumsum(1).cumsum(2), (1, 0, 1, 0))
    return s[:, h:, w:] - s[:, :-h, w:] - s[:, h:, :-w] + s[:, :-h, :-w]


def boundary_counts(prediction, label, num_classes):
    """(2, K) int64: intersection and union of the boundary regions, 2 % of the diagonal wide.

    prediction, label: (B, H, W).
    """
    h, w = label.shape[1:]
    d = max(1, round(0.02 * (h**2 + w**2) ** 0.5))
    prediction = torch.where(label == IGNORE, IGNORE, prediction)  # no edges inside void
    p = torch.where(boundary(prediction, d), prediction, IGNORE).flatten().long()
    g = torch.where(boundary(label, d), label, IGNORE).flatten().long()
    n_p, n_g, both = (torch.bincount(v, minlength=256)[:num_classes] for v in (p, g, p[p == g]))
    return torch.stack([both, n_p + n_g - both])


def scores(matrix, edges, num_classes=None):
    """The metrics of a confusion matrix (K, K) and boundary counts (2, K): plain floats and None.

    A class in neither labels nor predictions has IoU None and is left out of the means. Outputs
    from num_classes on are none of the classes: to predict one is a miss, and it has no IoU.
    """
    matrix = matrix.double()
    hits, total = matrix.diag(), matrix.sum()
    union = matrix.sum(0) + matrix.sum(1) - hits

    def ratios(part, whole):
        values = [p / w if w else None for p, w in zip(part.tolist(), whole.tolist())]
        present = [v for v in values if v is not None]
        return values, sum(present) / len(present) if present else None

    n = num_classes or len(matrix)
    iou, miou = ratios(hits[:n], union[:n])
    edge_iou, edge_miou = ratios(edges[0, :n].double(), edges[1, :n].double())
    _, mean_acc = ratios(hits[:n], matrix.sum(1)[:n])
    return dict(
        miou=miou,
        pixel_acc=(hits.sum() / total).item() if total else None,
        mean_acc=mean_acc,
        boundary_iou=edge_miou,
        iou=iou,
        boundary_iou_by_class=edge_iou,
    )


# ------------------------------------------------------------------------------------------------
# inference


def predict(net, images, size, **views):
    """Scores (B, K, *size) of normalised images (B, 3, H, W): logits, or the mean softmax of
    several views (see `logits_of`).
    """
    found = logits_of(net, images, **views)
    n, total = 1, resize(next(found), size)
    for n, logits in enumerate(found, start=2):
        total = total.softmax(dim=1) if n == 2 else total
        total += resize(logits, size).softmax(dim=1)
    return total / n


def predict_ids(net, images, size, **views):
    """The ids (B, *size) of the classes whose scores by `predict` are largest.

    In less memory, as that holds K maps of the size: of one view, only a few are there at a time.
    """
    if len(views.get("scales", [1])) > 1 or views.get("flip"):
        return predict(net, images, size, **views).argmax(dim=1)
    (logits,) = logits_of(net, images, **views)
    best = ids = None
    n = max(1, AT_ONCE // (len(images) * size[0] * size[1]))
    for k, part in enumerate(logits.split(n, dim=1)):
        value, index = resize(part, size).max(dim=1)
        if best is not None:
            better = value > best
            index = torch.where(better, index + k * n, ids)
            value = torch.where(better, value, best)
        best, ids = value, index
    return ids


def logits_of(net, images, scales=(1.0,), flip=False, window=None, stride=None):
    """Yield logits (B, K, h, w) of each view: images resized by `scales`, with flip mirrored too.

    window, stride: side and step of a sliding window, whose logits are averaged.
    """
    for scale in scales:
        x = images
        if scale != 1:
            side = [max(32, round(n * scale)) for n in images.shape[2:]]
            x = F.interpolate(x, size=side, mode="bilinear", antialias=scale < 1)
        for view in (x, x.flip(3)) if flip else (x,):
            logits = slide(net, view, window, stride) if window else net(view).logits
            yield logits.float() if view is x else logits.float().flip(3)


def slide(net, x, window, stride):
    """Mean logits (B, K, H, W) of windows that cover x (B, 3, H, W), the last at its end."""
    H, W = x.shape[2:]
    starts = [sorted({*range(0, max(n - window, 0), stride), max(n - window, 0)}) for n in (H, W)]
    total = torch.zeros(len(x), net.num_classes, H, W, device=x.device)
    count = torch.zeros(H, W, device=x.device)
    for top in starts[0]:
        for left in starts[1]:
            at = (..., slice(top, top + window), slice(left, left + window))
            logits = net(x[at]).logits.float()  # (B, K, h, w)
            total[at] += resize(logits, x[at].shape[2:])
            count[at[1:]] += 1
    return total / count


def autocast(device, dtype):
    """A context of bf16 or fp16 autocast; without effect for float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, getattr(torch, dtype))


def groups(split, indices, batch_size):
    """Yield up to batch_size neighbouring indices whose images have one size, and the images."""
    group, images = [], []
    for i in indices:
        image = split.image(i)
        if group and (image.shape != images[0].shape or len(group) == batch_size):
            yield group, images
            group, images = [], []
        group.append(i)
        images.append(image)
    if group:
        yield group, images


def prepare(image, facts, short_side=None):
    """uint8 image (H, W, 3) -> normalised float (1, 3, h, w), its shorter side resized if asked."""
    image = catalog.resize_image(image, short_side)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    return normalise(x, facts["mean"], facts["std"])


@torch.no_grad()
def evaluate(
    net,
    split,
    facts,
    device="cpu",
    dtype="float32",
    protocol="full",
    batch_size=8,
    parts=None,
    save=None,
    **views,
):
    """Metrics of `net` on a split. Of N processes each scores every N-th image, none twice.

    parts: the name of each image's part of the split; the parts are then also scored separately.
    save: called with an image's index and its predicted ids (H, W) uint8.

    protocol "full": labels at their own resolution, logits resized to them.
    protocol "paper", as in the TransKD release: images resized to a shorter side of 512; labels
    resized by nearest to the logits' size, a quarter of that. Not comparable with full-resolution
    figures.
    """
    rank, world = parallel.rank_and_world()
    K, training = net.num_classes, net.training
    net.eval()
    short_side = 512 if protocol == "paper" else facts["resize"]
    names = sorted(set(parts or [""]))
    # of each part: the confusion matrix, then intersections and unions of the boundaries
    counts = torch.zeros(len(names), K + 2, K, dtype=torch.int64, device=device)
    progress = files.Progress("scoring", len(split), every=math.inf if rank else 5.0)
    for indices, images in groups(split, range(rank, len(split), world), batch_size):
        labels = [split.label(i) for i in indices]
        x = torch.cat([prepare(image, facts, short_side) for image in images])  # (B, 3, h, w)
        if protocol == "paper":
            quarter = tuple(-(-n // 4) for n in x.shape[2:])
            labels = [catalog.resize_label(label, quarter) for label in labels]
        y = torch.from_numpy(np.stack(labels)).to(device)  # (B, H, W)
        with autocast(device, dtype):
            p = predict_ids(net, x.to(device), y.shape[1:], **views).to(torch.uint8)
        for i, ids, label in zip(indices, p, y):
            part = counts[names.index(parts[i] if parts else "")]
            part[:K] += confusion(ids, label, K)
            part[K:] += boundary_counts(ids[None], label[None], K)
            if save:
                save(i, ids.cpu().numpy())
        progress.at(indices[-1] + 1)
    net.train(training)
    if world > 1:
        dist.all_reduce(counts)
    n = len(facts["classes"])
    counts = counts.cpu()
    total = counts.sum(0)
    metrics = scores(total[:K], total[K:], n)
    if parts:
        each = {name: scores(part[:K], part[K:], n) for name, part in zip(names, counts)}
        metrics["parts"] = {k: v | dict(images=parts.count(k)) for k, v in each.items()}
    return metrics | dict(classes=list(facts["classes"]), images=len(split), protocol=protocol)


# ------------------------------------------------------------------------------------------------
# pictures


def paint(ids, palette):
    """(H, W) class ids -> (H, W, 3) uint8; IGNORE is black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table[ids]


def overlay(image, ids, classes, palette):
    """The photo blended with its labels' colours, and a legend of its classes, largest first."""
    mixed = (0.5 * image + 0.5 * paint(ids, palette)).astype(np.uint8)
    picture = Image.fromarray(mixed)
    draw = ImageDraw.Draw(picture, "RGBA")
    side = max(8, min(picture.size) // 40)
    font, step = ImageFont.load_default(side), int(1.4 * side)
    found = [k for k in np.argsort(-np.bincount(ids.ravel(), minlength=256)) if (ids == k).any()]
    found = [k for k in found if k < len(classes)][: max(1, picture.height // step - 1)]
    if not found:  # void all over
        return picture
    width = max(draw.textlength(classes[k], font) for k in found) + 2.5 * side
    draw.rectangle((0, 0, width, step * len(found) + side // 2), fill=(0, 0, 0, 150))
    for row, k in enumerate(found):
        y = row * step + side // 2
        draw.rectangle((side // 2, y, 1.5 * side, y + side), fill=tuple(palette[k]))
        draw.text((2 * side, y - side // 8), classes[k], fill="white", font=font)
    return picture


def save_image(picture, path):
    with files.atomic(path) as tmp:
        picture.save(tmp, format="PNG")


def photos_of(source):
    """The paths that --image names: a photo, or those of a folder, sorted by name."""
    if not source.exists():
        raise UserError(f"{source}: no such file")
    if not source.is_dir():
        return [source]
    paths = sorted(path for path in source.iterdir() if path.is_file())
    photos = [path for path in paths if catalog.is_image(path.name)]
    if not photos:
        raise UserError(f"{source}: no photos in it ({', '.join(catalog.PHOTO_SUFFIXES)})")
    if len(photos) < len(paths):
        others = files.some(path.name for path in paths if path not in photos)
        print(f"{source}: {len(photos)} photos; left out: {others}")
    return photos


@torch.no_grad()
def label_photos(net, facts, args, views):
    """--image: for every photo a colour mask, an overlay and the ids, at the photo's own size."""
    source = Path(args.image)
    paths, unread = photos_of(source), []
    if not args.out_dir:
        raise UserError("--image needs --out-dir, the folder for the pictures")
    files.check_folder("--out-dir", args.out_dir)
    if paths[0].parent.resolve() == Path(args.out_dir).resolve():
        raise UserError(f"--out-dir {args.out_dir}: the photos are there; pass another folder")
    stems = [p.stem for p in paths]
    taken = {p.name for p in paths}
    out = Path(args.out_dir)
    for k, path in enumerate(paths):
        try:
            image = catalog.read_image(path)
        except UserError as e:
            unread.append(e)
            print(f"{k + 1}/{len(paths)} {e}")
            continue
        side = model.photo_side(facts) or max(32, min(image.shape[:2]))  # no net takes less
        x = prepare(image, facts, side).to(args.device)
        with autocast(args.device, args.dtype):
            ids = predict_ids(net, x, image.shape[:2], **views)[0].to(torch.uint8).cpu().numpy()
        ids[ids >= len(facts["classes"])] = IGNORE
        alone = stems.count(path.stem) == 1 and path.stem not in taken
        name = path.stem if alone else path.name  # beside a.jpg: of a.png, and of a.jpg.png
        save_image(Image.fromarray(paint(ids, facts["palette"])), out / f"{name}_mask.png")
        picture = overlay(image, ids, facts["classes"], facts["palette"])
        save_image(picture, out / f"{name}_overlay.png")
        save_image(Image.fromarray(ids), out / f"{name}_ids.png")
        print(f"{k + 1}/{len(paths)} {path} -> {out}/{name}_{{mask,overlay,ids}}.png")
    if unread:
        raise UserError(f"{len(unread)} of {len(paths)} not labelled; the first: {unread[0]}")


# ------------------------------------------------------------------------------------------------
# the command


def percent(value):
    return "   -  " if value is None else f"{100 * value:6.2f}"


def print_table(metrics):
    print(f"{'class':>22s}    IoU  boundary IoU")
    rows = zip(metrics["classes"], metrics["iou"], metrics["boundary_iou_by_class"])
    for name, iou, edge in rows:
        print(f"{name:>22s} {percent(iou)}        {percent(edge)}")
    print(f"{'mean':>22s} {percent(metrics['miou'])}        {percent(metrics['boundary_iou'])}")
    pixel, mean = percent(metrics["pixel_acc"]), percent(metrics["mean_acc"])
    print(f"pixel accuracy {pixel}, mean accuracy {mean}")
    for name, part in metrics.get("parts", {}).items():
        print(f"{name:>22s} {percent(part['miou'])}  mIoU of {part['images']} images")
    print(f"{metrics['images']} images, protocol {metrics['protocol']}")


def get_args(argv=None):
    p = argparse.ArgumentParser(
        description="Score a checkpoint, or label photos with it", allow_abbrev=False
    )
    p.add_argument(
        "--ckpt",
        required=True,
        help="student.pt or teacher.pt of a run; or somebody else's SegFormer, DeepLabV3 or FCN: a "
        "file, a folder, a name on the Hugging Face hub, torchvision/NAME",
    )
    # what to score
    p.add_argument(
        "--dataset", help=f"one of {', '.join(catalog.DATASETS)} (default: the run's own)"
    )
    p.add_argument("--data-dir", help="the folder that holds it")
    p.add_argument("--split", help="val (the default), train, or test if there is one")
    p.add_argument("--cache", choices=("on", "off"), help="on (the default): decode the files once")
    p.add_argument("--cache-dir", help="where to (default: .cache beside the data)")
    p.add_argument(
        "--protocol",
        choices=("full", "paper"),
        help="full (the default): at the size of the labels; paper: as in TransKD's release, "
        "images resized to a shorter side of 512, labels to a quarter of that",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    p.add_argument(
        "--save-preds",
        metavar="DIR",
        help="write each prediction as a PNG named after its image, with the values that the data "
        "set's benchmark server expects (Cityscapes: labelIds, ACDC: trainIds)",
    )
    # or what to label
    p.add_argument("--image", help="a photo, or a folder of them")
    p.add_argument("--out-dir", help="where its mask, overlay and ids go")
    # how
    p.add_argument(
        "--short-side",
        type=int,
        help="resize images to this shorter side (default: photos as in training, images to score "
        "only if training was at one size)",
    )
    p.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], help="average over these scales"
    )
    p.add_argument("--flip", action="store_true", help="average over mirrored images too")
    p.add_argument(
        "--window", type=int, help="side of a sliding window; for images far larger than crops"
    )
    p.add_argument("--stride", type=int, help="its step (default: 3/4 of the window)")
    p.add_argument("--batch-size", type=int, help="images at a time, all of one size (default: 8)")
    p.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:N, cpu"
    )
    p.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the forward pass (default: as in training, if the device supports it)",
    )
    return p.parse_args(argv)


def main(args):
    scoring = "json dataset data_dir split cache cache_dir protocol batch_size save_preds".split()
    given = [name for name in scoring if getattr(args, name) not in (None, False)]
    if args.image and given:
        raise UserError(f"--image labels photos: {files.as_flag(given[0])} is for scoring")
    for name, value in dict(split="val", protocol="full", cache="on", batch_size=8).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    data.check_cache(args)
    if args.window is not None and args.window < 32:
        raise UserError(f"--window {args.window}: at least 32, the encoder's coarsest stride")
    if args.stride is not None and not 1 <= args.stride <= (args.window or 0):
        raise UserError(f"--stride {args.stride}: 1 to --window, or there would be gaps")
    if not all(0 < s <= 16 for s in args.scales) or args.batch_size < 1:
        raise UserError("--scales must be above 0 and up to 16, --batch-size at least 1")
    if args.short_side is not None and args.protocol == "paper":
        raise UserError("--short-side: with --protocol paper it is 512 by itself")
    if args.short_side is not None and not 32 <= args.short_side <= 8192:
        raise UserError(f"--short-side {args.short_side}: from 32 to 8192")
    if args.out_dir and not args.image:
        raise UserError("--out-dir goes with --image; --save-preds writes what is scored")
    if args.save_preds and args.protocol == "paper":
        raise UserError(
            "--save-preds goes with --protocol full: predictions at the labels' own size"
        )
    args.device = parallel.get_device(args.device)
    parallel.keep_memory()
    views = dict(scales=args.scales, flip=args.flip, window=args.window)
    views["stride"] = args.stride or (args.window or 0) * 3 // 4
    # with --json the progress of the cache goes to stderr, so that stdout is JSON alone
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        net, facts = model.load(args.ckpt)
        net.to(args.device)
        facts["resize"] = args.short_side or facts["resize"]
        if not args.dtype:
            native = parallel.has_native(args.device, facts["dtype"])
            args.dtype = facts["dtype"] if native else "float32"
        if args.image:
            return label_photos(net, catalog.complete(facts, net.num_classes), args, views)
        metrics = score(net, facts, args, views)
    if args.json:
        print(json.dumps(metrics))
    else:
        print_table(metrics)


def score(net, facts, args, views):
    """--dataset: the metrics of a split, and its predictions as files with --save-preds."""
    if not (args.dataset or facts["dataset"]):
        raise UserError(f"{args.ckpt} does not say what it was trained on: pass --dataset")
    name = args.dataset or facts["dataset"]
    if name == "scenes" and (args.data_dir or args.cache_dir):
        raise UserError("the drawn scenes are in no folder: leave --data-dir and --cache-dir out")
    folder = catalog.folder_of(name, args.data_dir)
    dataset = catalog.open_dataset(name, folder)
    catalog.check_classes(args.ckpt, net, facts, dataset)
    facts = catalog.complete(facts, net.num_classes, dataset)
    save, pairs = None, dataset.pairs.get(args.split, ())
    if args.save_preds:
        every = itertools.chain(*dataset.pairs.values()) if dataset.name != "scenes" else ()
        own = {path.parent for pair in every for path in pair[1:] if path}
        if Path(args.save_preds).resolve() in {folder.resolve() for folder in own}:
            raise UserError(
                f"--save-preds {args.save_preds}: the data set's own files; pass another folder"
            )
        values = np.zeros(256, np.uint8)  # an output that is no class becomes 0
        values[: len(dataset.classes)] = dataset.ids or range(len(dataset.classes))

        def save(i, ids):
            name = f"{pairs[i]:07d}" if dataset.name == "scenes" else pairs[i][1].stem
            save_image(Image.fromarray(values[ids]), Path(args.save_preds) / f"{name}.png")

    split = data.open_split(dataset, args.split, folder, args.cache, args.cache_dir)
    options = (args.device, args.dtype, args.protocol, args.batch_size)
    metrics = evaluate(net, split, facts, *options, dataset.parts_of(args.split), save, **views)
    if metrics["pixel_acc"] is None:
        print(f"{dataset.name}/{args.split} has no labels: nothing to score")
    return metrics


if __name__ == "__main__":
    files.cli(main, get_args())
