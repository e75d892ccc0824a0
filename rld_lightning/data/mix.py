"""Mixup and CutMix of training images."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rld_lightning.mps import image_layout


class Other(NamedTuple):
    """The second label of each image in a mixed batch."""

    label: Tensor  # the class of the other image, int64 `(B,)`
    share: float  # share of each image's own label, in [0, 1]; the rest is the other's


class MixDraw(NamedTuple):
    """The random draws for mixing a batch."""

    share: float  # share of the image itself, in [0, 1]
    # CutMix's box from the other image: first row, row after the last, and the same for columns; None for Mixup
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Mix:
    """Mixes each image of a batch with the one before it, all with the same share, like torchvision's ``v2.MixUp``.

    With an image x, the other one x' and l drawn from Beta(a, a)::

        Mixup    l x + (1 - l) x'                            (Zhang et al., ICLR 2018, arXiv 1710.09412)
        CutMix   x with a box from x', of the share 1 - l of its area; a box that crosses the border is clipped, and l
                 is then the remaining share of x            (Yun et al., ICCV 2019, arXiv 1905.04899)

    With both, each batch uses one of the two, at random. The draws are a function of the seed, the epoch and the step;
    the other image is from the same process.

    Raises:
        ValueError: a parameter is below 0.
    """

    mixup: float  # a of Mixup, such as 0.2; 0 for none
    cutmix: float  # a of CutMix, such as 1; 0 for none
    seed: int  # of the draws

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name}={value} must be 0, for none, or more: 0.2 mixes little, 1 mixes evenly.")

    def __bool__(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def draw(self, epoch: int, step: int, height: int, width: int) -> MixDraw:
        """Draws the mixing of a step's batch."""
        chance = np.random.default_rng([self.seed, epoch, step])
        boxes = bool(self.cutmix) and (not self.mixup or chance.random() < 0.5)
        a = self.cutmix if boxes else self.mixup
        share = float(chance.beta(a, a))
        if not boxes:
            return MixDraw(share, None)
        sides = []
        for extent in (height, width):
            half, middle = int(extent * (1 - share) ** 0.5 / 2), int(chance.integers(extent))
            sides += [max(middle - half, 0), min(middle + half, extent)]
        top, bottom, left, right = sides
        return MixDraw(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix_images(images: Tensor, draw: MixDraw) -> Tensor:
    """Mixes images ``(B, 3, H, W)``, each with the one before it, the first with the last."""
    others = images.roll(1, 0)
    if draw.box is None:
        return torch.lerp(others, images, draw.share).contiguous(memory_format=image_layout(images.device))
    top, bottom, left, right = draw.box
    mixed = images.clone(memory_format=torch.preserve_format)
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed
