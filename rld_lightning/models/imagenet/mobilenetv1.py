"""MobileNetV1 for large images: Howard et al., 2017, arXiv 1704.04861, table 1."""

import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.models.layers import conv
from rld_lightning.models.registry import register_model
from rld_lightning.models.stages import Stages

# (out_channels, stride) of the depthwise-separable blocks; the last of each resolution is a stage.
_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)


@register_model
class MobileNetV1(nn.Module):
    """A convolution of stride 2 and 13 depthwise-separable blocks; 1/32 of the resolution at the end.

    Its stages have no stem: the first is at a quarter of the resolution.
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        inputs = (32, *(channels for channels, _ in _BLOCKS))
        stem = nn.Sequential(conv(3, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU())
        blocks = (_separable(inputs[i], channels, stride) for i, (channels, stride) in enumerate(_BLOCKS))
        self.model = nn.Sequential(stem, *blocks)
        self.fc = nn.Linear(inputs[-1], num_classes)

    @property
    def stages(self) -> Stages:
        """The last block at each of four resolutions."""
        blocks = ("model.3", "model.5", "model.11", "model.13")
        norms = tuple(f"{block}.4" for block in blocks)
        return Stages(features=blocks, preactivations=norms, pooled="fc:in", last_map="model", norms=norms)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        return self.fc(F.adaptive_avg_pool2d(self.model(images), 1).flatten(1))


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv(in_channels, in_channels, 3, stride, groups=in_channels),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        conv(in_channels, out_channels, 1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )
