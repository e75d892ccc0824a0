"""Residual networks for small images: He et al., CVPR 2016, arXiv 1512.03385, section 4.2; and widened ones ("x4")."""

import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.models.layers import conv, init_convs
from rld_lightning.models.registry import register_size
from rld_lightning.models.stages import Stages


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, projected by a 1 x 1 convolution if the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                conv(in_channels, out_channels, 1, stride),
                nn.BatchNorm2d(out_channels),
            )
        # A module, unlike the first activation, so that its input can be tapped.
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H / stride, W / stride)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet(nn.Module):
    """Three stages of equal depth at full, half and quarter resolution.

    Args:
        depth: number of layers with weights, ``6 n + 2``.
        widths: channels of the stem and of the three stages.
        num_classes: number of logits.

    Raises:
        ValueError: a depth that is not ``6 n + 2``.
    """

    def __init__(
        self, depth: int, widths: tuple[int, int, int, int] = (16, 16, 32, 64), num_classes: int = 100
    ) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if blocks < 1 or remainder:
            raise ValueError(f"depth={depth!r} is not allowed; it must be 6 n + 2 with n >= 1.")
        self.conv1 = conv(3, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(blocks, widths[0], widths[1], stride=1)
        self.layer2 = _stage(blocks, widths[1], widths[2], stride=2)
        self.layer3 = _stage(blocks, widths[2], widths[3], stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        init_convs(self)

    @property
    def stages(self) -> Stages:
        """Stem and three stages."""
        last = [f"layer{i}.{len(self.layer1) - 1}" for i in (1, 2, 3)]
        return Stages(
            features=("relu", "layer1", "layer2", "layer3"),
            preactivations=("relu", *(f"{block}.relu:in" for block in last)),
            pooled="fc:in",
            last_map="layer3",
            norms=tuple(f"{block}.bn2" for block in last),
        )

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        out = self.relu(self.bn1(self.conv1(images)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


# Stages four times as wide as usual, and a stem twice as wide.
_WIDE = (32, 64, 128, 256)

resnet8 = register_size("resnet8", ResNet, 8)
resnet14 = register_size("resnet14", ResNet, 14)
resnet20 = register_size("resnet20", ResNet, 20)
resnet32 = register_size("resnet32", ResNet, 32)
resnet44 = register_size("resnet44", ResNet, 44)
resnet56 = register_size("resnet56", ResNet, 56)
resnet110 = register_size("resnet110", ResNet, 110)
resnet8x4 = register_size("resnet8x4", ResNet, 8, _WIDE)
resnet32x4 = register_size("resnet32x4", ResNet, 32, _WIDE)
