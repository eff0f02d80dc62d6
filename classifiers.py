"""
Image classifiers: an encoder and one Linear, as MiTs are pre-trained; and plain vision transformers
(DeiT), the students of the manifold paper, whose teacher is a CaiT. Like every net here,
`net(images)` returns an Output; its logits are (B, K).
"""

import torch
from torch import nn
from torchvision.models import VisionTransformer

import model
import weights
from files import UserError, load_tensors, save_tensors
from nets import Output

VITS = {"vit_tiny": (192, 3), "vit_small": (384, 6)}  # width and heads of DeiT's, 12 blocks each
BLOCKS = (0, 1, 2, 3, 8, 9, 10, 11)  # of a ViT: their outputs, which manifold compares
NAMES = (*model.MODELS, *VITS)


class Classifier(nn.Module):
    """An encoder of model.py; its last map, averaged over the positions, goes through one Linear.

    features are the four stages' maps (B, C_i, H_i, W_i). The encoder's tensors are named as
    in the segmenter, so that training can start there from this classifier's file.
    """

    def __init__(self, name, num_classes, drop_path=None):
        super().__init__()
        net = model.build(name, 2, drop_path)  # its head is dropped
        self.name, self.num_classes, self.channels = name, num_classes, net.channels
        self.encoder = net.encoder
        self.classifier = nn.Linear(self.channels[-1], num_classes)
        model.init_weights(self.classifier)

    def forward(self, images, head=True):
        features, embeddings = self.encoder(images)
        logits = self.classifier(features[-1].mean((2, 3))) if head else None  # (B, K)
        return Output(logits, features, embeddings)


class ViT(VisionTransformer):
    """torchvision's, with its initialisation, for images of one size; patch: its side in pixels.

    features are the outputs of BLOCKS, as maps (B, width, size / patch, size / patch),
    without the class token. Weight decay acts on it and on the positions too, as it does not in
    DeiT's recipe.
    """

    def __init__(self, name, num_classes, size, patch):
        width, heads = VITS[name]
        super().__init__(size, patch, 12, heads, width, 4 * width, num_classes=num_classes)
        self.name, self.channels = name, (width,) * len(BLOCKS)

    def forward(self, images, head=True):
        x = self.conv_proj(images)  # (B, C, h, w)
        h, w = x.shape[2:]
        x = torch.cat([self.class_token.expand(len(x), -1, -1), model.to_tokens(x)], dim=1)
        x, features = x + self.encoder.pos_embedding, []  # (B, 1 + h * w, C)
        for k, block in enumerate(self.encoder.layers):
            x = block(x)
            if k in BLOCKS:
                features.append(model.to_map(x[:, 1:], h, w))
        logits = self.heads(self.encoder.ln(x)[:, 0]) if head else None  # (B, K)
        return Output(logits, tuple(features), ())


def build(name, num_classes, size, patch=None, drop_path=None):
    """A classifier with random weights, for images of size x size.

    name: one of NAMES. patch, of ViTs: if None, 16, or 8 for images below 128; drop_path, of all
    others: the rate of stochastic depth, if None as published. Raises UserError if the size does
    not suit the net, and for a patch or drop_path that the net does not have.
    """
    if name not in NAMES:
        raise UserError(f"unknown model '{name}': choose one of {', '.join(NAMES)}")
    if name not in VITS:
        if patch:
            raise UserError(f"--patch has no effect on {name}: its patches are fixed")
        if size < 32:
            raise UserError(f"--size {size}: {name} needs 32 at least")
        return Classifier(name, num_classes, drop_path)
    if drop_path is not None:
        raise UserError(f"--drop-path has no effect on {name}: it has no stochastic depth")
    patch = patch or default_patch(size)
    if size % patch:
        raise UserError(f"--size {size}: {name} cuts it into patches of {patch}; take a multiple")
    return ViT(name, num_classes, size, patch)


def default_patch(size):
    return 8 if size < 128 else 16


def save(path, net, **facts):
    """Write a classifier and what is needed to rebuild it; facts: size, classes, patch, ..."""
    tree = dict(format=weights.FORMAT, kind="classifier", model=net.name) | facts
    save_tensors(path, tree | {"state_dict": net.state_dict()})


def load(path):
    """(net in eval mode, facts) of what `save` wrote; facts: size, patch, classes, mean, std."""
    tree = load_tensors(path)
    if not isinstance(tree, dict) or tree.get("kind") != "classifier":
        found = tree.get("model") if isinstance(tree, dict) else None
        found = found if isinstance(found, str) else "something else"
        raise UserError(f"{path}: {found}, and no classifier; pass an encoder.pt of pretrain.py")
    state = tree.pop("state_dict")
    net = build(tree["model"], len(tree["classes"]), tree["size"], tree["patch"])
    try:
        net.load_state_dict(state)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{path}: damaged, or no {tree['model']} ({reason})") from e
    return net.eval(), tree
