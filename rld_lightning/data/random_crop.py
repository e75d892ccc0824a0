"""What is done to an image that is trained on, and at what fraction of its size that lets it be decoded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from rld_lightning.data.decode import REDUCTIONS

# A crop of twice the size that it is resized to, or more, comes out the same (within half of 255 steps on average)
# whether or not the image was decoded at a fraction of its size. Pillow's `thumbnail` has the same margin.
REDUCING_GAP = 2


class RandomCropFlip(v2.RandomResizedCrop):
    """``v2.RandomResizedCrop`` and then ``v2.RandomHorizontalFlip``, with the same draws.

    Args:
        size: height and width of the result.
        scale: range of the share of the area that a crop covers.
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
        """Cuts out, resizes and perhaps mirrors."""
        crop = super().transform(inpt, {name: value for name, value in params.items() if name != "flip"})
        return v2.functional.horizontal_flip(crop) if params["flip"] else crop

    def draw_reduction(self, height: int, width: int) -> int:
        """Draws a crop of an image of this size and returns by how much the image may be reduced before it is cut out.

        The same draws give a crop of the same share of the reduced image.
        """
        crop = self.make_params([torch.empty(1).expand(3, height, width)])
        target_height, target_width = (REDUCING_GAP * side for side in self.size)
        spare = min(crop["height"] // target_height, crop["width"] // target_width)
        return next((reduction for reduction in REDUCTIONS if reduction <= spare), 1)
