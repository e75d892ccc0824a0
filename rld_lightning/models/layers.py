"""Layers and initialisation shared by several families."""

from torch import Tensor, nn


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution without bias (a batch norm follows), padded so that stride 1 keeps the size."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)


def init_convs(model: nn.Module) -> None:
    """He initialisation by fan-out: normal, variance ``2 / (kernel area * out_channels)``; biases 0.

    He et al., "Delving Deep into Rectifiers", arXiv 1502.01852.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def channel_shuffle(features: Tensor, groups: int) -> Tensor:
    """Interleaves channel groups (ShuffleNet, arXiv 1707.01083, figure 1): ``(B, C, H, W)`` to the same shape."""
    return features.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
