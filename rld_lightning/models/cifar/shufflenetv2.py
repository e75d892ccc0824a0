"""ShuffleNetV2 of width 1 for small images: Ma et al., ECCV 2018, arXiv 1807.11164, figure 3 (c, d) and table 5."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.models.layers import channel_shuffle, conv
from rld_lightning.models.registry import register_model
from rld_lightning.models.stages import Stages


class BasicUnit(nn.Module):
    """Half of the channels pass unchanged, the others through 1 x 1, depthwise 3 x 3 and 1 x 1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` to the same shape."""
        untouched, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = self.bn3(self.conv3(out))
        # The unchanged half has already passed a ReLU, so a second one is a no-op, and its input is a single tensor
        # to tap.
        return channel_shuffle(self.relu(torch.cat([untouched, out], dim=1)), groups=2)


class DownUnit(nn.Module):
    """Two branches of stride 2 from all channels: depthwise 3 x 3 and 1 x 1; 1 x 1, depthwise 3 x 3 and 1 x 1."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = conv(in_channels, in_channels, 3, stride=2, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv(in_channels, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(in_channels, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv(half, half, 3, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H / 2, W / 2)``."""
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = self.bn5(self.conv5(self.bn4(self.conv4(right))))
        return channel_shuffle(F.relu(torch.cat([left, right], dim=1)), groups=2)


@register_model
class ShuffleV2(nn.Module):
    """Stages of 116, 232 and 464 channels, each halving the resolution, between two 1 x 1 convolutions.

    A preactivation is the last unit's concatenation of both halves, before the ReLU and the channel shuffle, so the
    order of its channels differs from the feature's.
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = conv(3, 24, 1)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        self.layer1 = _stage(4, 24, 116)
        self.layer2 = _stage(8, 116, 232)
        self.layer3 = _stage(4, 232, 464)
        self.conv2 = conv(464, 1024, 1)
        self.bn2 = nn.BatchNorm2d(1024)
        self.last_relu = nn.ReLU()  # a module of its own, so that its output can be tapped
        self.linear = nn.Linear(1024, num_classes)

    @property
    def stages(self) -> Stages:
        """Stem and three stages."""
        return Stages(
            features=("relu", "layer1", "layer2", "layer3"),
            preactivations=("relu", "layer1.3.relu:in", "layer2.7.relu:in", "layer3.3.relu:in"),
            pooled="linear:in",
            last_map="last_relu",
            widening=("conv2", "bn2", "last_relu"),
        )

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        out = self.relu(self.bn1(self.conv1(images)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = self.last_relu(self.bn2(self.conv2(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(units: int, in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(in_channels, out_channels), *(BasicUnit(out_channels) for _ in range(units - 1)))
