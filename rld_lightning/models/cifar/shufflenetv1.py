"""ShuffleNetV1 with three groups for small images: Zhang et al., CVPR 2018, arXiv 1707.01083, table 1."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.models.layers import channel_shuffle, conv
from rld_lightning.models.registry import register_model
from rld_lightning.models.stages import Stages

_GROUPS = 3


class ShuffleUnit(nn.Module):
    """Grouped 1 x 1, channel shuffle, depthwise 3 x 3, grouped 1 x 1 convolution.

    The shortcut is added; with stride 2 it is averaged and concatenated instead, after the new channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, reduce_groups: int = _GROUPS) -> None:
        super().__init__()
        self.stride, self.reduce_groups = stride, reduce_groups
        new_channels = out_channels - in_channels if stride == 2 else out_channels
        hidden = new_channels // 4
        self.conv1 = conv(in_channels, hidden, 1, groups=reduce_groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = conv(hidden, hidden, 3, stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = conv(hidden, new_channels, 1, groups=_GROUPS)
        self.bn3 = nn.BatchNorm2d(new_channels)
        # A module, unlike the other activations, so that its input can be tapped.
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H / stride, W / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = channel_shuffle(out, self.reduce_groups)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return self.relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1))
        return self.relu(out + x)


@register_model
class ShuffleV1(nn.Module):
    """Stages of 240, 480 and 960 channels, each halving the resolution, after a 1 x 1 convolution of stride 1."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = conv(3, 24, 1)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        # The paper does not group the first reduction, as its input is narrow.
        self.layer1 = _stage(4, 24, 240, reduce_groups=1)
        self.layer2 = _stage(8, 240, 480)
        self.layer3 = _stage(4, 480, 960)
        self.linear = nn.Linear(960, num_classes)

    @property
    def stages(self) -> Stages:
        """Stem and three stages."""
        return Stages(
            features=("relu", "layer1", "layer2", "layer3"),
            preactivations=("relu", "layer1.3.relu:in", "layer2.7.relu:in", "layer3.3.relu:in"),
            pooled="linear:in",
            last_map="layer3",
        )

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        out = self.relu(self.bn1(self.conv1(images)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(units: int, in_channels: int, out_channels: int, reduce_groups: int = _GROUPS) -> nn.Sequential:
    first = ShuffleUnit(in_channels, out_channels, 2, reduce_groups)
    return nn.Sequential(first, *(ShuffleUnit(out_channels, out_channels, 1) for _ in range(units - 1)))
