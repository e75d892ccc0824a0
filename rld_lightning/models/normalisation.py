"""The normalisation of a network's input, and the conversion between two.

Data are normalised once. A network trained with another normalisation gets the same pixels in its own, by one
multiplication and one addition.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rld_lightning.models.libraries import published_input
from rld_lightning.models.weights.facts import WeightsFacts


class Normalisation(NamedTuple):
    """The mean and standard deviation of the images' normalisation."""

    mean: tuple[float, ...]  # mean of each channel, for values in [0, 1]
    std: tuple[float, ...]  # standard deviation of each channel, for values in [0, 1]

    def __str__(self) -> str:
        return f"mean {list(self.mean)} and std {list(self.std)}"


def parse_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalisation | None:
    """Parses a teacher's options ``mean`` and ``std``.

    Args:
        mean: three numbers, or None.
        std: three numbers above 0, or None.

    Returns:
        the normalisation; None if both are None.

    Raises:
        ValueError: only one is given, or they are not three numbers each.
    """
    if mean is None and std is None:
        return None
    three = [isinstance(v, Sequence) and len(v) == 3 and all(type(n) in (int, float) for n in v) for v in (mean, std)]
    if mean is None or std is None or not all(three) or min(std) <= 0:
        raise ValueError(
            f"model.teacher.mean={mean} and model.teacher.std={std} must be three numbers each, those of std above 0, "
            "such as model.teacher.mean=[0.5,0.5,0.5] model.teacher.std=[0.5,0.5,0.5]; or set both to null."
        )
    return Normalisation(tuple(mean), tuple(std))


def stored_normalisation(facts: WeightsFacts) -> Normalisation | None:
    """Returns the normalisation stored in a weights file; None if there is none."""
    return None if facts.mean is None or facts.std is None else Normalisation(facts.mean, facts.std)


def published_normalisation(name: str) -> Normalisation | None:
    """Returns the normalisation published for a network's pretrained weights; None for other networks."""
    found = published_input(name)
    return None if found is None else Normalisation(*found[:2])


class Renormalise(nn.Module):
    """Converts images to another normalisation: ``x * std / std' + (mean - mean') / std'``, in float32 or better.

    Args:
        given: the normalisation of the input.
        wanted: the normalisation of the output.
        size: height and width of the output, resized with bilinear interpolation and antialiasing; None for no change.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, given: Normalisation, wanted: Normalisation, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.size = size
        (mean, std), (own_mean, own_std) = (
            torch.tensor(values, dtype=torch.float64)[..., None, None] for values in (given, wanted)
        )
        self.register_buffer("scale", (std / own_std).float(), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``(B, 3, H, W)`` to the same shape, except for the size."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return torch.addcmul(self.shift, images, self.scale)


def make_renormalise(
    given: Normalisation, wanted: Normalisation | None, size: tuple[int, int] | None = None
) -> Renormalise | None:
    """Creates the conversion to the normalisation and size that a network needs; None if images have both."""
    wanted = given if wanted is None else wanted
    return None if wanted == given and size is None else Renormalise(given, wanted, size)
