"""Networks that see images in a size of their own, which is part of their name: ``timm/resnet18@224``."""

import re
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from rld_lightning.limits import LARGEST_SIDE

_SIZED = re.compile(r"([^@]+|transformers/.+)@(\d+)")


def split_size(name: str) -> tuple[str, int | None]:
    """A network's name without its size, and the side of the images that it wants to see.

    Args:
        name: ``"timm/resnet18@224"``; others, such as ``"resnet8@resnet32x4"``, are left as they are.

    Returns:
        the name, and the side in pixels; None for those of the data.

    Raises:
        ValueError: a size that no image has.
    """
    found = _SIZED.fullmatch(name)
    if found is None:
        return name, None
    plain, digits = found.groups()
    if len(digits) > 4 or not 0 < int(digits) <= LARGEST_SIDE:
        raise ValueError(
            f"{name} wants images of {digits} pixels a side; give 1 to {LARGEST_SIDE}, such as {plain}@224."
        )
    return plain, int(digits)


def at_size(network: nn.Module, side: int) -> nn.Module:
    """Has a network resize images to ``(side, side)`` before it looks at them: bilinear, antialiased, in float32.

    Part of its forward and not a module around it: its keys and paths stay, and whatever traces, compiles or counts the
    network has the resizing with it.

    Args:
        network: maps ``(B, 3, H, W)`` to logits; is changed, its class becomes one of the same name.
        side: height and width.
    """
    own = type(network)
    network.__class__ = type(own.__name__, (_Resized, own), {"__module__": own.__module__, "_side": side})
    return network


class _Resized(nn.Module):
    _side: int

    def forward(self, images: Tensor) -> Any:  # alone, as tracing knows no *args
        resized = F.interpolate(images.float(), (self._side, self._side), mode="bilinear", antialias=True)
        return super().forward(resized.to(images.dtype))
