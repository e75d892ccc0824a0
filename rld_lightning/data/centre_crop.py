"""The transform of evaluation images, shared by evaluation, prediction and exports."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchvision.transforms import v2

# A longer aspect ratio is cropped to this one before resizing, which would otherwise take unbounded memory: an image of
# 2 x 6,000 would be resized to 256 x 768,000 pixels.
MOST_ASPECT = 32


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
