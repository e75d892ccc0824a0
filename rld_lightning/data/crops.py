"""The crops of images from files: a random one in training, the centre in evaluation, prediction and exports."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from rld_lightning.data.decode import REDUCTIONS

# If a crop has at least twice the size that it is resized to, decoding at reduced size does not change the result
# (within half of 255 steps on average). Pillow's `thumbnail` has the same margin.
REDUCING_GAP = 2
# A longer aspect ratio is cropped to this one before resizing, which would otherwise take unbounded memory: an image of
# 2 x 6,000 would be resized to 256 x 768,000 pixels.
MOST_ASPECT = 32


class RandomCropFlip(v2.RandomResizedCrop):
    """``v2.RandomResizedCrop`` followed by ``v2.RandomHorizontalFlip``, with the same draws.

    Args:
        size: height and width of the result.
        scale: range of a crop's share of the area.
        flip: whether crops are mirrored with probability 1/2.
    """

    def __init__(self, size: Sequence[int], scale: Sequence[float], flip: bool) -> None:
        super().__init__(size, scale=scale, antialias=True)
        self.flip = flip

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the crop and the flip."""
        crop = super().make_params(flat_inputs)
        return crop | {"flip": self.flip and bool(torch.rand(1) < 0.5)}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """Crops, resizes and flips as drawn."""
        crop = super().transform(inpt, {name: value for name, value in params.items() if name != "flip"})
        return v2.functional.horizontal_flip(crop) if params["flip"] else crop

    def draw_reduction(self, height: int, width: int) -> int:
        """Draws a crop of an image of this size, and returns the factor by which the image may be reduced beforehand.

        The same draws give the same relative crop of the reduced image.
        """
        crop = self.make_params([torch.empty(1).expand(3, height, width)])
        target_height, target_width = (REDUCING_GAP * side for side in self.size)
        spare = min(crop["height"] // target_height, crop["width"] // target_width)
        return next((reduction for reduction in REDUCTIONS if reduction <= spare), 1)


class CentreCrop(v2.Transform):
    """``v2.Resize`` of the shorter side, then ``v2.CenterCrop``, in bounded memory for any aspect ratio.

    Args:
        resize: length of the shorter side after resizing.
        size: height and width of the result.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
    """

    def __init__(self, resize: int, size: Sequence[int], interpolation: str = "bilinear") -> None:
        super().__init__()
        self.resize = resize
        self.size = list(size)
        self.interpolation = v2.InterpolationMode(interpolation)

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """Resizes and crops."""
        longest = MOST_ASPECT * min(inpt.shape[-2:])
        if max(inpt.shape[-2:]) > longest:
            inpt = v2.functional.center_crop(inpt, [min(side, longest) for side in inpt.shape[-2:]])
        resized = v2.functional.resize(inpt, [self.resize], interpolation=self.interpolation, antialias=True)
        return v2.functional.center_crop(resized, self.size)
