"""Wide residual networks: Zagoruyko and Komodakis, BMVC 2016, arXiv 1605.07146."""

import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.models.layers import conv, init_convs
from rld_lightning.models.registry import register_size
from rld_lightning.models.stages import Stages


class PreactivationBlock(nn.Module):
    """Batch norm and ReLU come before each of the two 3 x 3 convolutions.

    If the width changes, the shortcut is a 1 x 1 convolution of the activated input; otherwise it is the raw input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.convShortcut = conv(in_channels, out_channels, 1, stride) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H / stride, W / stride)``, without a last ReLU."""
        activated = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class Stage(nn.Module):
    """A sequence of blocks; a separate module, because published keys are ``block1.layer.0...``."""

    def __init__(self, blocks: int, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        first = PreactivationBlock(in_channels, out_channels, stride)
        rest = (PreactivationBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H / stride, W / stride)``."""
        return self.layer(x)


class WideResNet(nn.Module):
    """Three stages of pre-activation blocks at full, half and quarter resolution.

    Stage outputs have not passed a ReLU; their preactivations are taken after the *next* batch norm. Each batch norm
    runs once per forward pass. The published distillation code runs three of them a second time for the
    preactivations, which updates their running statistics twice per training step; here a tap reads the first result.

    Args:
        depth: number of layers with weights, ``6 n + 4``.
        width: factor on the channels 16, 32, 64 of the stages.
        num_classes: number of logits.

    Raises:
        ValueError: a depth that is not ``6 n + 4``.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 100) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 4, 6)
        if blocks < 1 or remainder:
            raise ValueError(f"depth={depth!r} is not allowed; it must be 6 n + 4 with n >= 1.")
        self.conv1 = conv(3, 16, 3)
        self.block1 = Stage(blocks, 16, 16 * width, stride=1)
        self.block2 = Stage(blocks, 16 * width, 32 * width, stride=2)
        self.block3 = Stage(blocks, 32 * width, 64 * width, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()  # a module, so that its output can be tapped
        self.fc = nn.Linear(64 * width, num_classes)
        init_convs(self)
        nn.init.zeros_(self.fc.bias)

    @property
    def stages(self) -> Stages:
        """Stem and three stages."""
        next_norms = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
        return Stages(
            features=("conv1", "block1", "block2", "block3"),
            preactivations=("conv1", *next_norms),
            pooled="fc:in",
            last_map="relu",
            norms=next_norms,
        )

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        out = self.block3(self.block2(self.block1(self.conv1(images))))
        out = self.relu(self.bn1(out))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


wrn16_1 = register_size("wrn16_1", WideResNet, 16, 1)
wrn16_2 = register_size("wrn16_2", WideResNet, 16, 2)
wrn16_4 = register_size("wrn16_4", WideResNet, 16, 4)
wrn28_2 = register_size("wrn28_2", WideResNet, 28, 2)
wrn28_4 = register_size("wrn28_4", WideResNet, 28, 4)
wrn40_1 = register_size("wrn40_1", WideResNet, 40, 1)
wrn40_2 = register_size("wrn40_2", WideResNet, 40, 2)
