"""From the pixels of a picture to what a network takes: the same steps and the same bits as in validation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rld_lightning.models.libraries import published_input
from rld_lightning.models.weights.facts import WeightsFacts
from rld_lightning.models.weights.read import WeightsError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Picture = str | Path | Image.Image | np.ndarray | Tensor

_SMALL = ("cifar100", "digits")  # data sets whose images have the network's size already
_FOLDERS_SHARE = 0.875  # of the resized shorter side that the centre has, where a file does not say


@dataclass(frozen=True)
class Preprocessing:
    """What a network wants to see. Called with a picture, it gives a normalised float32 image ``(3, H, W)``.

    A picture is the path of a file (JPEG, PNG, WebP, ...), a ``PIL.Image``, an array of uint8 ``(H, W, 3)`` or a tensor
    of uint8 ``(3, H, W)``; of a file or a PIL image the EXIF orientation is heeded.
    """

    size: tuple[int, int]  # height and width of what the network takes
    resize: int  # what the shorter side of a picture becomes before its centre is cropped
    mean: tuple[float, ...]  # of each channel, for values in [0, 1]
    std: tuple[float, ...]  # standard deviation of each channel, likewise
    interpolation: str = "bilinear"  # `"bilinear"` or `"bicubic"`, with antialiasing

    def __call__(self, picture: "Picture") -> Tensor:
        """Reads where need be, resizes, crops and normalises one picture.

        Raises:
            ValueError: a file that cannot be read as an image, or values of another kind.
        """
        return self.normalize(self.crop(pixels_of(picture)))

    def crop(self, pixels: Tensor) -> Tensor:
        """Resizes and crops uint8 pixels ``(..., 3, H, W)``."""
        from rld_lightning.data.centre_crop import CentreCrop  # torchvision, for those who have pictures

        return CentreCrop(self.resize, self.size, self.interpolation)(pixels)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Turns uint8 pixels ``(..., 3, H, W)`` into what the network takes: ``(x / 255 - mean) / std``."""
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std)
        )  # as ToTensor and Normalize of torchvision, bit for bit
        return pixels.float().div(torch.tensor(255.0, device=pixels.device)).sub(mean).div(std)

    def pixels(self, images: Tensor) -> Tensor:
        """The uint8 pixels ``(..., 3, H, W)`` that normalised images were made of: the way back, exact."""
        mean, std = (
            torch.tensor(values, dtype=torch.float64, device=images.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return images.double().mul(std).add(mean).mul(255).round().clamp(0, 255).byte()

    def framed(self, pixels: Tensor) -> Tensor:
        """Cropped uint8 pixels ``(B, 3, H, W)`` in a black frame, of which resizing and cropping leaves the same."""
        (height, width), side = self.size, self.resize
        frame = pixels.new_zeros(*pixels.shape[:-2], side, side)
        top, left = _half(side - height), _half(side - width)
        frame[..., top : top + height, left : left + width] = pixels
        return frame

    def describe(self) -> str:
        """One line for the console."""
        height, width = self.size
        return (
            f"shorter side to {self.resize} ({self.interpolation}), centre {height}x{width}, mean {list(self.mean)}, "
            f"std {list(self.std)}"
        )


class PixelsToProbabilities(nn.Module):
    """A network with its preprocessing before it and softmax behind: uint8 ``(B, H, W, 3)`` to ``(B, C)``.

    Pixels lie as cameras and decoders leave them, channels last. They are resized and cropped as :class:`Preprocessing`
    does, but for its rounding between columns and rows: values differ by about 1 of 255 at most, or more where bicubic
    interpolation overshoots.

    Args:
        network: maps normalised images ``(B, 3, H, W)`` to logits ``(B, C)``.
        preprocessing: what it wants to see.
        resize: whether images of any size come, those of a batch of one; otherwise they have the network's already.

    Raises:
        ValueError: with ``resize``, the crop may be larger than what it is cut from.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, *, resize: bool = False) -> None:
        super().__init__()
        if resize and max(preprocessing.size) > preprocessing.resize:
            height, width = preprocessing.size
            raise ValueError(
                f"images of {height}x{width} cannot be cut from any that is resized to {preprocessing.resize}; give "
                "any_size=false, and images of that size."
            )
        self.network = network
        self.preprocessing = preprocessing
        self.resize = resize
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name))[:, None, None]
            self.register_buffer(name, values, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Probabilities, each row of sum 1."""
        images = pixels.permute(0, 3, 1, 2).float()
        if self.resize:
            images = self._crop(images)
        return self.network(images.div(255.0).sub(self.mean).div(self.std)).float().softmax(1)

    def _crop(self, images: Tensor) -> Tensor:
        """The centre of resized images, in whole numbers that a program can compute for each size anew."""
        side, (height, width) = self.preprocessing.resize, self.preprocessing.size
        shorter = torch.sym_min(*images.shape[-2:])
        size: list[int] = [side * extent // shorter for extent in images.shape[-2:]]  # type: ignore[misc]  # whole numbers or their symbols
        images = F.interpolate(images, size, mode=self.preprocessing.interpolation, antialias=True)
        images = images.round().clamp(0, 255)
        for dim, extent, own in zip((2, 3), size, (height, width), strict=True):
            # Not a slice, of which exporters would note whether it was all there is.
            images = images.index_select(dim, _half(extent - own) + torch.arange(own, device=images.device))
        return images


def _half(number: int) -> int:
    """Half of a number, at .5 the even neighbour, as torchvision has it: ``round(number / 2)``."""
    below = number // 2
    return (number + below - below // 2 * 2) // 2


def pixels_of(picture: "Picture") -> Tensor:
    """A picture as uint8 RGB ``(3, H, W)``, upright.

    Raises:
        ValueError: a file that cannot be read as an image, or values of another kind.
    """
    if isinstance(picture, str | Path):
        from rld_lightning.data.decode import read_image

        return read_image(str(picture))
    if isinstance(picture, Tensor):
        pixels = picture
    elif hasattr(picture, "getexif"):
        from PIL import ImageOps
        from torchvision.transforms.v2.functional import pil_to_tensor

        image: Any = picture
        pixels = pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    else:
        pixels = torch.as_tensor(picture).permute(2, 0, 1) if picture.ndim == 3 else torch.as_tensor(picture)
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(
            f"a picture of {pixels.dtype} {tuple(pixels.shape)} is not understood; give a path, a PIL image, an array "
            "of uint8 (H, W, 3) or a tensor of uint8 (3, H, W)."
        )
    return pixels


def preprocessing_of(
    facts: WeightsFacts,
    name: str,
    source: str | Path,
    *,
    image_size: int | None = None,
    resize: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
) -> Preprocessing:
    """What a network wants to see: what is given, else what its file says, else what its library says.

    Args:
        image_size: height and width of what the network takes.
        resize: what the shorter side becomes before that is cropped.

    Raises:
        WeightsError: nobody says it, or the crop is larger than what it is cut from.
    """
    published = None if (facts.mean and facts.std and facts.image_shape) else published_input(name)
    usual_mean, usual_std, usual_side = published or (None, None, None)
    size = (image_size, image_size) if image_size else facts.image_shape[1:] if facts.image_shape else None
    size = size or ((usual_side, usual_side) if usual_side else None)
    mean, std = mean or facts.mean or usual_mean, std or facts.std or usual_std
    if size is None or mean is None or std is None:
        lacking = [key for key, value in (("image_size", size), ("mean", mean), ("std", std)) if value is None]
        raise WeightsError(
            f"{source} does not say what images have to look like; give {', '.join(f'{key}=' for key in lacking)}"
        )
    side = min(size)
    resize = resize or (facts.resize if image_size is None else None)
    resize = resize or (side if facts.dataset in _SMALL else round(side / _FOLDERS_SHARE))
    if resize < side:
        raise WeightsError(f"{source}: resize={resize} is less than the {side} pixels that are cropped from it")
    return Preprocessing(size, resize, tuple(mean), tuple(std), interpolation or facts.interpolation or "bilinear")
