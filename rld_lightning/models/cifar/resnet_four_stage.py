"""The four-stage residual networks of ImageNet on small images: He et al., CVPR 2016, arXiv 1512.03385, table 1.

The stem is one 3 x 3 convolution of stride 1 without max-pooling, so 32 x 32 images reach the last stage at 4 x 4. For
large images use ``torchvision/resnet18`` and the like.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.models.layers import conv, init_convs
from rld_lightning.models.registry import register_size
from rld_lightning.models.stages import Stages


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)
        # A module, unlike the first activation, so that its input can be tapped.
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, channels, H / stride, W / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride) and widening 1 x 1 convolution, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, 4 * channels, H / stride, W / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class FourStageResNet(nn.Module):
    """Stages of 64, 128, 256 and 512 channels (times the block's expansion), the last three halving the resolution.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        blocks: number of blocks of each stage.
        num_classes: number of logits.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: tuple[int, int, int, int], num_classes: int = 100
    ) -> None:
        super().__init__()
        self.conv1 = conv(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _stage(block, blocks[0], 64, 64, stride=1)
        self.layer2 = _stage(block, blocks[1], 64 * block.expansion, 128, stride=2)
        self.layer3 = _stage(block, blocks[2], 128 * block.expansion, 256, stride=2)
        self.layer4 = _stage(block, blocks[3], 256 * block.expansion, 512, stride=2)
        self.linear = nn.Linear(512 * block.expansion, num_classes)
        self._last_norm = "bn2" if block is BasicBlock else "bn3"
        init_convs(self)

    @property
    def stages(self) -> Stages:
        """Stem and four stages."""
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)
        last = [f"layer{i}.{len(layer) - 1}" for i, layer in enumerate(layers, start=1)]
        return Stages(
            features=("relu", "layer1", "layer2", "layer3", "layer4"),
            preactivations=("relu", *(f"{block}.relu:in" for block in last)),
            pooled="linear:in",
            last_map="layer4",
            norms=tuple(f"{block}.{self._last_norm}" for block in last),
        )

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        out = self.relu(self.bn1(self.conv1(images)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


def _stage(
    block: type[BasicBlock | Bottleneck], blocks: int, in_channels: int, channels: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels * block.expansion, channels, 1) for _ in range(blocks - 1)))


resnet18 = register_size("resnet18", FourStageResNet, BasicBlock, (2, 2, 2, 2))
resnet50 = register_size("resnet50", FourStageResNet, Bottleneck, (3, 4, 6, 3))
