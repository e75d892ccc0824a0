"""What images look like to a network: the mean and spread that they are normalised with, and their size.

Each network was trained with a look of its own. Data are normalised once, and a network that wants another look gets
the same pixels under its own, by one multiplication and one addition.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rld_lightning.models.libraries import published_input
from rld_lightning.models.weights.facts import WeightsFacts


class Look(NamedTuple):
    """How images are normalised."""

    mean: tuple[float, ...]  # mean of each channel, for values in [0, 1]
    std: tuple[float, ...]  # standard deviation of each channel, likewise

    def __str__(self) -> str:
        return f"mean {list(self.mean)} and std {list(self.std)}"


def look_of(mean: Sequence[float] | None, std: Sequence[float] | None) -> Look | None:
    """The look that a teacher's ``mean`` and ``std`` ask for.

    Args:
        mean: three numbers, or None.
        std: three numbers above 0, or None.

    Returns:
        the look; None where both are None.

    Raises:
        ValueError: there is one of the two, or they are not three numbers each.
    """
    if mean is None and std is None:
        return None
    three = [isinstance(v, Sequence) and len(v) == 3 and all(type(n) in (int, float) for n in v) for v in (mean, std)]
    if mean is None or std is None or not all(three) or min(std) <= 0:
        raise ValueError(
            f"model.teacher.mean={mean} and model.teacher.std={std} must be three numbers each, those of std above 0, "
            "such as model.teacher.mean=[0.5,0.5,0.5] model.teacher.std=[0.5,0.5,0.5]; or null both."
        )
    return Look(tuple(mean), tuple(std))


def trained_look(facts: WeightsFacts) -> Look | None:
    """The look that a file of weights says its network was trained with; None where it does not say."""
    return None if facts.mean is None or facts.std is None else Look(facts.mean, facts.std)


def published_look(name: str) -> Look | None:
    """The look that torchvision or timm says the pretrained weights of a network want; None for other networks."""
    found = published_input(name)
    return None if found is None else Look(*found[:2])


class Relook(nn.Module):
    """Takes normalised images to another look: ``x * std / std' + (mean - mean') / std'``, in float32 or better.

    Args:
        given: the look that images come in.
        wanted: the look that they leave in.
        size: height and width that they leave in, resized by bilinear interpolation, with antialiasing; None for those
            that they come in.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, given: Look, wanted: Look, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.size = size
        (mean, std), (own_mean, own_std) = (
            torch.tensor(look, dtype=torch.float64)[..., None, None] for look in (given, wanted)
        )
        self.register_buffer("scale", (std / own_std).float(), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to the same shape, but for the size."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return torch.addcmul(self.shift, images, self.scale)


def relook(given: Look, wanted: Look | None, size: tuple[int, int] | None = None) -> Relook | None:
    """What takes images to the look, and the size, that a network wants; None where they have both."""
    wanted = given if wanted is None else wanted
    return None if wanted == given and size is None else Relook(given, wanted, size)
