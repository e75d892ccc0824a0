"""From a picture's pixels to a network's input, bit for bit as in validation."""

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

_SMALL = ("cifar100", "digits")  # data sets whose images already have the network's input size
_FOLDERS_SHARE = 0.875  # crop size / resized shorter side, if a file does not state the resize


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of a network's input: a call maps a picture to a normalised float32 image ``(3, H, W)``.

    A picture is the path of a file (JPEG, PNG, WebP, ...), a ``PIL.Image``, an array of uint8 ``(H, W, 3)`` or a tensor
    of uint8 ``(3, H, W)``; the EXIF orientation of files and PIL images is applied.
    """

    size: tuple[int, int]  # height and width of the network's input
    resize: int  # length of the shorter side after resizing, before the centre crop
    mean: tuple[float, ...]  # mean of each channel, for values in [0, 1]
    std: tuple[float, ...]  # standard deviation of each channel, for values in [0, 1]
    interpolation: str = "bilinear"  # `"bilinear"` or `"bicubic"`, with antialiasing

    def __call__(self, picture: "Picture") -> Tensor:
        """Reads (if given a path), resizes, crops and normalises one picture.

        Raises:
            ValueError: the file cannot be read as an image, or the values have another dtype or shape.
        """
        return self.normalize(self.crop(pixels_of(picture)))

    def crop(self, pixels: Tensor) -> Tensor:
        """Resizes and crops uint8 pixels ``(..., 3, H, W)``."""
        from rld_lightning.data.crops import CentreCrop  # here, as it imports torchvision

        return CentreCrop(self.resize, self.size, self.interpolation)(pixels)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalises uint8 pixels ``(..., 3, H, W)``: ``(x / 255 - mean) / std``."""
        mean, std = (
            torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std)
        )  # bit for bit like torchvision's ToTensor and Normalize
        return pixels.float().div(torch.tensor(255.0, device=pixels.device)).sub(mean).div(std)

    def denormalize(self, images: Tensor) -> Tensor:
        """Inverts :meth:`normalize` exactly: normalised images to uint8 pixels ``(..., 3, H, W)``."""
        mean, std = (
            torch.tensor(values, dtype=torch.float64, device=images.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return images.double().mul(std).add(mean).mul(255).round().clamp(0, 255).byte()

    def pad_for_resize(self, pixels: Tensor) -> Tensor:
        """Pads uint8 pixels ``(B, 3, H, W)`` with black so that resizing and cropping returns them unchanged."""
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
    """A network with its preprocessing and a softmax: uint8 ``(B, H, W, 3)`` to probabilities ``(B, C)``.

    Pixels are channels last, as cameras and decoders return them. They are resized and cropped as in
    :class:`Preprocessing`, but without its rounding between columns and rows: values differ by about 1 of 255 at most,
    or more if bicubic interpolation overshoots.

    Args:
        network: maps normalised images ``(B, 3, H, W)`` to logits ``(B, C)``.
        preprocessing: the preprocessing of its input.
        resize: whether to resize images of any size (one size per batch); otherwise they must have the input size.

    Raises:
        ValueError: ``resize`` is set and the crop is larger than the resized shorter side.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, *, resize: bool = False) -> None:
        super().__init__()
        if resize and max(preprocessing.size) > preprocessing.resize:
            height, width = preprocessing.size
            raise ValueError(
                f"images of {height}x{width} cannot be cropped from images resized to {preprocessing.resize}; use "
                "any_size=false, with images of that size."
            )
        self.network = network
        self.preprocessing = preprocessing
        self.resize = resize
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name))[:, None, None]
            self.register_buffer(name, values, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns probabilities; each row sums to 1."""
        images = pixels.permute(0, 3, 1, 2).float()
        if self.resize:
            images = self._crop(images)
        return self.network(images.div(255.0).sub(self.mean).div(self.std)).float().softmax(1)

    def _crop(self, images: Tensor) -> Tensor:
        """Resizes and centre-crops, in integer arithmetic that an exported program can evaluate for every size."""
        side, (height, width) = self.preprocessing.resize, self.preprocessing.size
        shorter = torch.sym_min(*images.shape[-2:])
        size: list[int] = [side * extent // shorter for extent in images.shape[-2:]]  # type: ignore[misc]  # integers or symbols
        images = F.interpolate(images, size, mode=self.preprocessing.interpolation, antialias=True)
        images = images.round().clamp(0, 255)
        for dim, extent, own in zip((2, 3), size, (height, width), strict=True):
            # Not a slice: exporters would specialise on whether it covers the whole extent.
            images = images.index_select(dim, _half(extent - own) + torch.arange(own, device=images.device))
        return images


def _half(number: int) -> int:
    """Returns ``round(number / 2)``, rounding .5 to the even neighbour like torchvision."""
    below = number // 2
    return (number + below - below // 2 * 2) // 2


def pixels_of(picture: "Picture") -> Tensor:
    """Converts a picture to uint8 RGB ``(3, H, W)``, with its EXIF orientation applied.

    Raises:
        ValueError: the file cannot be read as an image, or the values have another dtype or shape.
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
            f"a picture of {pixels.dtype} {tuple(pixels.shape)} is not supported; give a path, a PIL image, an array "
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
    """Returns a network's preprocessing: the given values, else its file's, else those published by its library.

    Args:
        image_size: height and width of the network's input.
        resize: length of the shorter side after resizing, before the crop.

    Raises:
        WeightsError: a value is not known, or the crop is larger than the resized image.
    """
    published = None if (facts.mean and facts.std and facts.image_shape) else published_input(name)
    usual_mean, usual_std, usual_side = published or (None, None, None)
    size = (image_size, image_size) if image_size else facts.image_shape[1:] if facts.image_shape else None
    size = size or ((usual_side, usual_side) if usual_side else None)
    mean, std = mean or facts.mean or usual_mean, std or facts.std or usual_std
    if size is None or mean is None or std is None:
        lacking = [key for key, value in (("image_size", size), ("mean", mean), ("std", std)) if value is None]
        raise WeightsError(
            f"{source} does not say how images are sized or normalised; give {', '.join(f'{key}=' for key in lacking)}"
        )
    side = min(size)
    resize = resize or (facts.resize if image_size is None else None)
    resize = resize or (side if facts.dataset in _SMALL else round(side / _FOLDERS_SHARE))
    if resize < side:
        raise WeightsError(f"{source}: resize={resize} is less than the {side} pixels that are cropped from it")
    return Preprocessing(size, resize, tuple(mean), tuple(std), interpolation or facts.interpolation or "bilinear")
