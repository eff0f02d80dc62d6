"""
CNN teachers: torchvision's DeepLabV3 (Chen et al., arXiv 1706.05587) and FCN (Long et al., CVPR
2015) on dilated ResNets.

    net = CNN("deeplabv3_resnet50", num_classes=19)
    out = net(images)       # float images (B, 3, H, W), normalised, as for MiT
    out.logits              # (B, K, ceil(H/8), ceil(W/8)); torchvision resizes them to the image
    out.features            # layer1 to layer4, after their last ReLU, at strides 4, 8, 8, 8
    out.embeddings          # (): a CNN has no patch embeddings
    out.decoded             # (B, width, ceil(H/8), ceil(W/8)), before the head's last ReLU

Tensors have torchvision's names, so its weights fit as they are. The auxiliary head is left out.
DeepLabV3 pools one map to 1x1 and batch-normalises it, over the batch alone: it cannot learn from
one image at a time, and with two that branch learns little.
"""

from torch import nn

from nets import Drop, Output

# name: its backbone's ImageNet weights, by their name in weights.read
MODELS = {
    "deeplabv3_resnet50": "torchvision/resnet50",
    "deeplabv3_resnet101": "torchvision/resnet101",
    "fcn_resnet50": "torchvision/resnet50",
    "fcn_resnet101": "torchvision/resnet101",
}
CLASSIFIER = "classifier.4.weight"  # the last layer's, in either head


class CNN(nn.Module):
    channels = (256, 512, 1024, 2048)
    has_embeddings = False  # no patch embeddings in its outputs

    def __init__(self, name, num_classes):
        super().__init__()
        from torchvision.models import get_model  # takes seconds, and MiT does without it

        net = get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)
        self.name, self.num_classes = name, num_classes
        self.backbone, self.classifier = net.backbone, net.classifier
        self.width = self.classifier[-1].in_channels  # 256; 512 in an FCN
        for parent in list(self.modules()):
            for key, child in parent.named_children():
                if isinstance(child, nn.Dropout):  # the same, with coins shared by all processes
                    setattr(parent, key, Drop(child.p, dims=4))

    def forward(self, images, head=True):
        x, features = images, []
        for name, layer in self.backbone.items():
            x = layer(x)
            if name.startswith("layer"):
                features.append(x)
        logits = decoded = None
        if head:
            for layer in self.classifier:
                if isinstance(layer, nn.ReLU):
                    decoded = x
                x = layer(x)
            logits = x
        return Output(logits, tuple(features), (), decoded)


def recognise(state):
    """(name in MODELS, number of classes) of a state dict; None for what it does not show."""
    blocks = {name.split(".")[2] for name in state if name.startswith("backbone.layer3.")}
    backbone = {6: "resnet50", 23: "resnet101"}.get(len(blocks))
    head = "deeplabv3" if any(name.startswith("classifier.0.convs.") for name in state) else "fcn"
    num_classes = len(state[CLASSIFIER]) if CLASSIFIER in state else None
    return backbone and f"{head}_{backbone}", num_classes
