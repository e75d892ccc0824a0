"""Networks with their own input size, which is part of their name: ``timm/resnet18@224``."""

import re
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from rld_lightning.limits import LARGEST_SIDE

_SIZED = re.compile(r"([^@]+|transformers/.+)@(\d+)")


def split_size(name: str) -> tuple[str, int | None]:
    """Splits a network's name into the plain name and the input size.

    Args:
        name: ``"timm/resnet18@224"``; names without a size, such as ``"resnet8@resnet32x4"``, are returned unchanged.

    Returns:
        the plain name, and the height and width in pixels; None for the size of the data's images.

    Raises:
        ValueError: the size is out of range.
    """
    match = _SIZED.fullmatch(name)
    if match is None:
        return name, None
    plain, digits = match.groups()
    if len(digits) > 4 or not 0 < int(digits) <= LARGEST_SIDE:
        raise ValueError(
            f"{name} asks for images of {digits} pixels a side; give 1 to {LARGEST_SIDE}, such as {plain}@224."
        )
    return plain, int(digits)


def with_input_size(network: nn.Module, side: int) -> nn.Module:
    """Makes a network resize its input to ``(side, side)``: bilinear, antialiased, in float32.

    The resizing is part of its forward rather than a wrapper module, so that keys and module paths do not change, and
    tracing, compiling and operation counts include it.

    Args:
        network: maps ``(B, 3, H, W)`` to logits; modified: its class becomes a subclass of the same name.
        side: height and width.
    """
    own = type(network)
    network.__class__ = type(own.__name__, (_Resized, own), {"__module__": own.__module__, "_side": side})
    return network


class _Resized(nn.Module):
    _side: int

    def forward(self, images: Tensor) -> Any:  # no *args, which tracing does not support
        resized = F.interpolate(images.float(), (self._side, self._side), mode="bilinear", antialias=True)
        return super().forward(resized.to(images.dtype))
