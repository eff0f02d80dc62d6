"""
Write a checkpoint in a form that other programs open.

    python export.py --ckpt out/student.pt --to hf --out-dir D           # Hugging Face transformers
    python export.py --ckpt out/student.pt --to onnx --mask --out-dir D  # ONNX Runtime
    python export.py --ckpt out/student.pt --to pt2 --out-dir D          # torch.export

What was written is opened again by the program it is for, and compared with the net on random
images of two sizes (where transformers is missing, only its weights). It is moved to --out-dir only
if the two agree.
"""

import argparse
import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import catalog
import files
import model
import weights
from augment import normalise
from distill import IGNORE
from files import UserError
from nets import resize

MIN_SIDE = 64  # with less, a map is one pixel high: torch.export makes that a special case
TRACED = (2, 96, 160)  # (B, H, W) of the images that a graph is traced with
COMPARED = ((1, 97, 131), (2, 160, 128))  # and of those that every export is compared on
# Largest allowed difference, relative to the largest logit. Measured: 2e-6 where only the order of
# sums differs, 5e-6 to 1e-5 in transformers, whose norms have another eps (see hf_configs).
TOLERANCE, HF_TOLERANCE = 1e-4, 1e-3
TIES = 1e-4  # and the share of the pixels in which two masks may differ

# ------------------------------------------------------------------------------------------------
# the comparison


@torch.no_grad()
def compare(net, other, tolerance, mean_std=None, void=None):
    """How far `other` is from `net`, as text; UserError if too far.

    other: a function of normalised images that returns logits; or, with mean_std, one of uint8
    photos (B, H, W, 3) that returns class ids (B, H, W), see `masked`.
    """
    rng = torch.Generator().manual_seed(0)
    limit, worst = TIES if mean_std else tolerance, 0
    what = "of the pixels" if mean_std else "of the largest logit"
    for B, H, W in COMPARED:
        if mean_std:
            images = torch.randint(256, (B, H, W, 3), dtype=torch.uint8, generator=rng)
            x = normalise(images.permute(0, 3, 1, 2).float() / 255, *mean_std)
            want = masked(resize(net(x).logits, (H, W)), void)
        else:
            images = torch.randn(B, 3, H, W, generator=rng)
            want = net(images).logits
        got = other(images)
        if got.shape != want.shape:
            raise UserError(f"discarded: it gives {tuple(got.shape)}, not {tuple(want.shape)}")
        differ = got != want if mean_std else (got - want).abs() / want.abs().max()
        error = (differ.double().mean() if mean_std else differ.max()).item()
        if not error <= limit:  # nan fails too
            raise UserError(f"discarded: it differs by {error:.1e} {what}, allowed {limit:.0e}")
        worst = max(worst, error)
    return f"largest difference on random images of {len(COMPARED)} sizes: {worst:.1e} {what}"


# ------------------------------------------------------------------------------------------------
# Hugging Face

HF_NAMES = (  # ours, theirs: as on the hub, which every version of transformers reads
    (r"^encoder\.stages\.(\d)\.patch_embed", r"segformer.encoder.patch_embeddings.\1"),
    (r"(patch_embeddings\.\d)\.norm", r"\1.layer_norm"),
    (r"^encoder\.stages\.(\d)\.norm", r"segformer.encoder.layer_norm.\1"),
    (r"^encoder\.stages\.(\d)\.blocks", r"segformer.encoder.block.\1"),
    (r"\.norm([12])\.", r".layer_norm_\1."),
    (r"\.attn\.q\.", ".attention.self.query."),
    (r"\.attn\.sr\.", ".attention.self.sr."),
    (r"\.attn\.norm\.", ".attention.self.layer_norm."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc([12])\.", r".mlp.dense\1."),
    (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
    (r"^head\.linears\.(\d)", r"decode_head.linear_c.\1.proj"),
    (r"^head\.fuse", "decode_head.linear_fuse"),
    (r"^head\.norm", "decode_head.batch_norm"),
    (r"^head\.classifier", "decode_head.classifier"),
)


def hf_state(state):
    """A state dict of ours in Hugging Face's names, with keys and values separate."""
    out = {}
    for name, tensor in state.items():
        for ours, theirs in HF_NAMES:
            name = re.sub(ours, theirs, name)
        if ".attn.kv." in name:
            key, value = tensor.chunk(2)
            out[name.replace(".attn.kv.", ".attention.self.key.")] = key
            out[name.replace(".attn.kv.", ".attention.self.value.")] = value
        else:
            out[name] = tensor
    return out


def hf_configs(net, facts, mean_std):
    """The contents of config.json and of preprocessor_config.json."""
    dims, heads, depths, _ = model.MODELS[net.name]
    classes = [*facts["classes"], "void"][: net.num_classes]
    config = dict(
        architectures=["SegformerForSemanticSegmentation"],
        model_type="segformer",
        num_channels=3,
        num_encoder_blocks=4,
        hidden_sizes=dims,
        num_attention_heads=heads,
        depths=depths,
        decoder_hidden_size=net.width,
        sr_ratios=model.SR_RATIOS,
        mlp_ratios=[4] * 4,
        patch_sizes=(7, 3, 3, 3),
        strides=(4, 2, 2, 2),
        layer_norm_eps=1e-6,  # ours in the blocks; transformers (5.24) uses 1e-5 regardless
        semantic_loss_ignore_index=IGNORE,
        id2label=dict(enumerate(classes)),
        label2id={name: k for k, name in enumerate(classes)},
    )
    config[weights.FORMAT] = {k: v for k, v in facts.items() if v is not None}  # for our own load
    processor = dict(
        image_processor_type="SegformerImageProcessor",
        do_resize=bool(model.photo_side(facts)),
        resample=2,  # bilinear, as in eval.prepare
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=mean_std[0],
        image_std=mean_std[1],
        do_reduce_labels=False,
    )
    if side := model.photo_side(facts):  # transformers 4.x heeds it only with use_fast=True
        processor["size"] = dict(shortest_edge=side)
    return config, processor


def fits_hugging_face(net):
    """Whether transformers has a net of this kind: a SegFormer."""
    mit = all(isinstance(stage, model.Stage) for stage in net.encoder.stages)
    return mit and isinstance(net.head, model.SegFormerHead)


def write_hf(net, facts, folder, mean_std):
    """A folder for from_pretrained, compared in transformers if that is installed."""
    from safetensors.torch import load_file, save

    trees = hf_configs(net, facts, mean_std)
    for name, tree in zip(("config.json", "preprocessor_config.json"), trees):
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n")
    state, path = hf_state(net.state_dict()), folder / "model.safetensors"
    path.write_bytes(save(state, metadata={"format": "pt"}))  # transformers asks for the format
    if not files.installed("transformers"):
        again = load_file(path)
        if again.keys() != state.keys() or any(not again[k].equal(state[k]) for k in state):
            raise UserError("discarded: the weights read back are not those that were written")
        return "the weights read back are the same; to compare logits: pip install transformers"
    from transformers import SegformerForSemanticSegmentation as Theirs

    theirs, info = Theirs.from_pretrained(folder, output_loading_info=True)
    if any(info.values()):
        raise UserError(f"discarded: transformers reports {info}")
    return compare(net, lambda images: theirs(images).logits, HF_TOLERANCE)


# ------------------------------------------------------------------------------------------------
# one graph of tensors: ONNX and torch.export


class FoldedHead(nn.Module):
    """A SegFormerHead with its constants multiplied out: the same function, fewer operations."""

    def __init__(self, head):
        super().__init__()
        norm, self.classifier = head.norm, head.classifier
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        fuse = (scale[:, None] * head.fuse.weight.flatten(1)).chunk(4, dim=1)  # stages 4 to 1
        pairs = list(zip(head.linears, reversed(fuse)))
        self.weights = nn.ParameterList((w @ fc.weight)[:, :, None, None] for fc, w in pairs)
        bias = norm.bias - scale * norm.running_mean
        self.bias = nn.Parameter(bias + sum(w @ fc.bias for fc, w in pairs))

    def forward(self, features):
        first, *rest = features
        x = F.conv2d(first, self.weights[0], self.bias)  # (B, width, H/4, W/4)
        for feature, w in zip(rest, self.weights[1:]):
            x = x + resize(F.conv2d(feature, w), first.shape[2:])
        return self.classifier(F.relu(x)), x


class Deployed(nn.Module):
    """The net with one input and one output. forward: normalised images (B, 3, H, W) -> logits
    (B, K, ceil(H/4), ceil(W/4)); or, with mean_std, photos (B, H, W, 3) -> class ids (B, H, W),
    both uint8.
    """

    def __init__(self, net, mean_std=None, void=None):
        super().__init__()
        self.encoder, self.head, self.mask = net.encoder, net.head, bool(mean_std)
        self.void = void
        if isinstance(net.head, model.SegFormerHead):
            self.head = FoldedHead(net.head)
        for name, values in zip(("mean", "std"), mean_std or ()):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images):
        if self.mask:
            images = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        features, _ = self.encoder(images)
        logits, _ = self.head(features)
        if not self.mask:
            return logits
        return masked(resize(logits, images.shape[2:]), self.void)


def masked(logits, void):
    """(B, K, H, W) -> (B, H, W) uint8 ids; IGNORE where the output `void`, no class, is largest."""
    ids = logits.argmax(dim=1).to(torch.uint8)
    return ids if void is None else ids.masked_fill(ids == void, IGNORE)


def trace(net, mean_std, void):
    """An ExportedProgram of `net` for any batch, height and width, and its dynamic_shapes."""
    B, H, W = TRACED
    print(f"tracing {net.name}: a minute or so", flush=True)
    module = Deployed(net, mean_std, void).eval().requires_grad_(False)
    images = torch.zeros(B, H, W, 3, dtype=torch.uint8) if mean_std else torch.zeros(B, 3, H, W)
    at = 1 if mean_std else 2
    free = {0: Dim("batch"), at: Dim("height", min=MIN_SIDE), at + 1: Dim("width", min=MIN_SIDE)}
    program = torch.export.export(module, (images,), dynamic_shapes=(free,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program, (free,)


def about(facts):
    """What users of a graph must know, {name: JSON string}."""
    strings = {name: facts[name] for name in ("classes", "palette", "mean", "std")}
    strings["short_side"] = model.photo_side(facts)
    return {name: json.dumps(value) for name, value in strings.items() if value is not None}


def write_onnx(net, facts, folder, mean_std):
    """model.onnx with its weights inside, compared in ONNX Runtime."""
    import onnxruntime

    program, shapes = trace(net, mean_std, facts["void"])
    program = torch.onnx.export(
        program,
        dynamo=True,
        dynamic_shapes=shapes,  # for the names
        input_names=["images"],
        output_names=["ids" if mean_std else "logits"],
        verbose=False,
    )
    program.model.metadata_props.update(about(facts))
    path = folder / "model.onnx"
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images):
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return compare(net, run, TOLERANCE, mean_std, facts["void"])


def write_pt2(net, facts, folder, mean_std):
    """model.pt2, compared after loading it again."""
    program, _ = trace(net, mean_std, facts["void"])
    buffer = io.BytesIO()  # torch.export.save to a full disk is a RuntimeError, write_bytes is not
    torch.export.save(program, buffer, extra_files=about(facts))
    path = folder / "model.pt2"
    path.write_bytes(buffer.getvalue())
    loaded = torch.export.load(path).module()
    return compare(net, loaded, TOLERANCE, mean_std, facts["void"])


# ------------------------------------------------------------------------------------------------
# the command

FORMS = dict(  # --to: how to write it, the packages it needs, how to open it
    hf=(
        write_hf,
        ["safetensors"],
        'SegformerForSemanticSegmentation.from_pretrained("{0}"), images from '
        'AutoImageProcessor.from_pretrained("{0}")',
    ),
    onnx=(
        write_onnx,
        ["onnx", "onnxscript", "onnxruntime"],
        'onnxruntime.InferenceSession("{}/model.onnx").run(None, {{"images": images}})',
    ),
    pt2=(write_pt2, [], 'torch.export.load("{}/model.pt2").module()(images)'),
)


@contextlib.contextmanager
def staging(out):
    """Yield a new folder. At the end its files move to `out`, each in one step, or are removed."""
    here = files.nearest_existing(out)  # on the same disk
    with tempfile.TemporaryDirectory(prefix=".export-", dir=here) as tmp:
        yield Path(tmp)
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(tmp).iterdir()):
            os.replace(path, out / path.name)


def get_args(argv=None):
    p = argparse.ArgumentParser(
        description="Write a checkpoint in a form that other programs open", allow_abbrev=False
    )
    p.add_argument("--ckpt", required=True, help="as for eval.py: a run's, or anybody's SegFormer")
    p.add_argument(
        "--to",
        required=True,
        choices=list(FORMS),
        help="hf: a folder for Hugging Face transformers, to share or to train on; onnx: one file "
        "for ONNX Runtime and phones; pt2: one file for torch.export.load, without this code. "
        "onnx and pt2 take any batch and any size of 64x64 pixels and more",
    )
    p.add_argument("--out-dir", required=True, help="the folder to write to; other files stay")
    p.add_argument(
        "--mask",
        action="store_true",
        help="onnx, pt2: from photos to class ids in one graph. Photos (B, H, W, 3), uint8 RGB, "
        "as decoders, PIL and NumPy hold them: apps need not transpose; ids (B, H, W), uint8. "
        "Without it: normalised float images (B, 3, H, W) to logits (B, K, H/4, W/4)",
    )
    return p.parse_args(argv)


def main(args):
    write, packages, usage = FORMS[args.to]
    out = Path(args.out_dir)
    if args.mask and args.to == "hf":
        raise UserError("--mask is for onnx and pt2: a Hugging Face folder has an image processor")
    if args.to == "onnx" and torch.__version__ < (2, 7):
        raise UserError("--to onnx needs torch 2.7: 2.6 cannot trace a resize to any size")
    missing = [name for name in packages if not files.installed(name)]
    if missing:
        raise UserError(f"--to {args.to} needs: pip install {' '.join(missing)}")
    files.check_folder("--out-dir", out)
    net, facts = model.load(args.ckpt)
    if not hasattr(net, "encoder"):
        raise UserError(f"{args.ckpt}: a {net.name}; CNNs teach here, they are not exported")
    if args.to == "hf" and not fits_hugging_face(net):
        raise UserError(f"{args.ckpt}: a {net.name}, which transformers lacks: use onnx or pt2")
    facts = catalog.complete(facts, net.num_classes)
    mean_std = (facts["mean"], facts["std"]) if args.mask or args.to == "hf" else None
    with files.writing(out), staging(out) as tmp:
        comparison = write(net, facts, tmp, mean_std)
        sizes = {path.name: path.stat().st_size / 1e6 for path in sorted(tmp.iterdir())}
    print(f"{out}: {', '.join(sizes)}, {sum(sizes.values()):.2f} MB")
    print(comparison)
    side = model.photo_side(facts)
    if side:
        how_to = "its image processor resizes photos" if args.to == "hf" else "resize photos"
        print(f"{how_to} to a shorter side of {side} pixels, as in training")
        if side < MIN_SIDE and args.to == "pt2":
            print(f"!!! A pt2 file takes no image below {MIN_SIDE} pixels: use onnx")
    print(f"open it with {usage.format(out)}")


if __name__ == "__main__":
    files.cli(main, get_args())
