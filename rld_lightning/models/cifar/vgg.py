"""VGG networks with batch norm for small images: Simonyan and Zisserman, ICLR 2015, arXiv 1409.1556, table 1."""

import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.models.layers import init_convs
from rld_lightning.models.registry import register_size
from rld_lightning.models.stages import Stages

_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five blocks of 3 x 3 convolutions (64, 128, 256, 512, 512 channels), then one linear layer.

    The resolution is halved after each of the first three blocks, and after the fourth for images at least 64 pixels
    high: 32 x 32 images reach the classifier's global average at 4 x 4, and so do 64 x 64 ones.

    Args:
        depths: number of convolutions of each block.
        num_classes: number of logits.
    """

    def __init__(self, depths: tuple[int, int, int, int, int], num_classes: int = 100) -> None:
        super().__init__()
        inputs = (3, *_WIDTHS)
        for i, depth in enumerate(depths):
            self.add_module(f"block{i}", _block(depth, inputs[i], _WIDTHS[i]))
            self.add_module(f"relu{i}", nn.ReLU())
        self.classifier = nn.Linear(_WIDTHS[-1], num_classes)
        init_convs(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    @property
    def stages(self) -> Stages:
        """Five blocks; the first counts as the stem."""
        blocks = ("block1", "block2", "block3", "block4")
        return Stages(
            features=("relu0", "relu1", "relu2", "relu3", "relu4"),
            preactivations=("relu0", *blocks),
            pooled="classifier:in",
            last_map="relu4",
            norms=tuple(f"{block}.{len(getattr(self, block)) - 1}" for block in blocks),
        )

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        out = images
        for i in range(len(_WIDTHS)):
            out = getattr(self, f"relu{i}")(getattr(self, f"block{i}")(out))
            if i < 3 or (i == 3 and images.shape[2] >= 64):
                out = F.max_pool2d(out, 2)
        return self.classifier(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _block(depth: int, in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [
            nn.Conv2d(out_channels if i else in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        ]
    # The last ReLU is a module of the network, so that a block's output is the preactivation.
    return nn.Sequential(*layers[:-1])


vgg8 = register_size("vgg8", VGG, (1, 1, 1, 1, 1))
vgg11 = register_size("vgg11", VGG, (1, 1, 2, 2, 2))  # configuration A of the paper
vgg13 = register_size("vgg13", VGG, (2, 2, 2, 2, 2))  # B
vgg16 = register_size("vgg16", VGG, (2, 2, 3, 3, 3))  # D
vgg19 = register_size("vgg19", VGG, (2, 2, 4, 4, 4))  # E
