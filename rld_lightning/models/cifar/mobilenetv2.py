"""MobileNetV2 of half width for small images: Sandler et al., CVPR 2018, arXiv 1801.04381, table 2."""

import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.models.layers import conv, init_convs
from rld_lightning.models.registry import register_model
from rld_lightning.models.stages import Stages

# (expansion, out_channels, blocks, stride) of each group, the channels half of the paper's.
_GROUPS = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)


class InvertedResidual(nn.Module):
    """Widening 1 x 1, depthwise 3 x 3 and narrowing 1 x 1 convolution; a shortcut if the shape does not change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            conv(in_channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            conv(hidden, hidden, 3, stride, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            conv(hidden, out_channels, 1),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H / stride, W / stride)``."""
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


@register_model
class MobileNetV2(nn.Module):
    """Seven groups of inverted residuals after a stem of stride 2; 1/16 of the resolution at the end.

    Differences from the paper, as in the published distillation code: ReLU for ReLU6, stride 1 in the second group,
    three convolutions in the first group's block too, and no dropout. Stage outputs are linear, so there are no
    preactivations.
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        stem, last = 16, 1280
        inputs = (stem, *(channels for _, channels, _, _ in _GROUPS))
        self.conv1 = nn.Sequential(conv(3, stem, 3, stride=2), nn.BatchNorm2d(stem), nn.ReLU())
        self.blocks = nn.Sequential(*(_group(inputs[i], *group) for i, group in enumerate(_GROUPS)))
        self.conv2 = nn.Sequential(conv(inputs[-1], last, 1), nn.BatchNorm2d(last), nn.ReLU())
        linear = nn.Linear(last, num_classes)
        self.classifier = nn.Sequential(linear)
        init_convs(self)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    @property
    def stages(self) -> Stages:
        """Stem, and the last group at each of four resolutions (the first at the stem's)."""
        groups = (1, 2, 4, 6)
        return Stages(
            features=("conv1", *(f"blocks.{i}" for i in groups)),
            preactivations=(),
            pooled="classifier:in",
            last_map="conv2",
            widening=("conv2",),
            norms=tuple(f"blocks.{i}.{_GROUPS[i][2] - 1}.conv.7" for i in groups),
        )

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        out = self.conv2(self.blocks(self.conv1(images)))
        return self.classifier(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _group(in_channels: int, expansion: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = InvertedResidual(in_channels, out_channels, stride, expansion)
    rest = (InvertedResidual(out_channels, out_channels, 1, expansion) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
