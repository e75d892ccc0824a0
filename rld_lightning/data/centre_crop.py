"""What is done to an image that a network is to judge: evaluation, prediction and exports do the same."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchvision.transforms import v2

# An image that is longer than so many times its shorter side is cut to that before it is resized, since it would take
# as much memory as its other side asks for: 256 x 768,000 pixels for one of 2 x 6,000.
MOST_ASPECT = 32


class CentreCrop(v2.Transform):
    """``v2.Resize`` of the shorter side and then ``v2.CenterCrop``, of an image of any aspect in bounded memory.

    Args:
        resize: what the shorter side becomes.
        size: height and width of the result.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
    """

    def __init__(self, resize: int, size: Sequence[int], interpolation: str = "bilinear") -> None:
        super().__init__()
        self.resize = resize
        self.size = list(size)
        self.interpolation = v2.InterpolationMode(interpolation)

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """Resizes and cuts out."""
        longest = MOST_ASPECT * min(inpt.shape[-2:])
        if max(inpt.shape[-2:]) > longest:
            inpt = v2.functional.center_crop(inpt, [min(side, longest) for side in inpt.shape[-2:]])
        resized = v2.functional.resize(inpt, [self.resize], interpolation=self.interpolation, antialias=True)
        return v2.functional.center_crop(resized, self.size)
