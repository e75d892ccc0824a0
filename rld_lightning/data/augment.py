"""Batched crop, flip and normalisation of uint8 images on the training device.

Images are stored NHWC, so that a pixel is three adjacent bytes: one ``index_select`` of pixels gathers, crops and flips
a batch, and the permuted result is in ``channels_last`` memory format at no cost.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.mps import image_layout

Device = torch.device | str


class CropFlip(NamedTuple):
    """Crop offsets of N samples in their padded images, and whether each crop is mirrored.

    ``top`` and ``left`` are ``(N,)`` int64 in [0, 2 * padding], ``flip`` is ``(N,)`` bool.
    """

    top: Tensor
    left: Tensor
    flip: Tensor


def pad_images(images: Tensor, padding: int) -> Tensor:
    """Pads uint8 images ``(N, H, W, 3)`` with ``padding`` black pixels on each side."""
    return F.pad(images, (0, 0, padding, padding, padding, padding))


def draw_crop_flip(size: int, *, padding: int, flip: bool, generator: torch.Generator) -> CropFlip:
    """Draws uniform crop offsets and, if ``flip``, fair coin flips for ``size`` samples from a CPU generator."""
    top, left = torch.randint(2 * padding + 1, (2, size), generator=generator)
    coin = torch.randint(2, (size,), generator=generator).bool()
    return CropFlip(top, left, coin if flip else torch.zeros_like(coin))


def count_views(padding: int, flip: bool) -> int:
    """Returns the number of crops and flips of one image."""
    return (2 * padding + 1) ** 2 * (2 if flip else 1)


def number_views(draw: CropFlip, padding: int, flip: bool) -> Tensor:
    """Returns each sample's view number among the :func:`count_views` of its image, int64 ``(N,)``."""
    place = draw.top * (2 * padding + 1) + draw.left
    return 2 * place + draw.flip if flip else place


def view_of_number(number: Tensor, padding: int, flip: bool) -> CropFlip:
    """Inverts :func:`number_views`: returns the crops and flips of view numbers, ``(N,)`` each."""
    place = number // 2 if flip else number
    mirrored = number % 2 == 1 if flip else torch.zeros_like(number, dtype=torch.bool)
    return CropFlip(place // (2 * padding + 1), place % (2 * padding + 1), mirrored)


def crop_flip(padded: Tensor, index: Tensor, draw: CropFlip, height: int, width: int) -> Tensor:
    """Gathers a batch of images, each cropped and flipped as drawn.

    Equal to torchvision's ``RandomCrop(size, padding)`` followed by ``RandomHorizontalFlip`` with the same draws.

    Args:
        padded: all images, uint8 ``(N, H + 2p, W + 2p, C)``, contiguous.
        index: the images to gather, int64 ``(B,)``.
        draw: the offsets and flips of these B samples.
        height: H, the height of a crop.
        width: W, the width of a crop.

    Returns:
        the crops, uint8 ``(B, H, W, C)``.
    """
    _, padded_height, padded_width, channels = padded.shape
    rows = draw.top[:, None] + torch.arange(height, device=padded.device)
    columns = torch.arange(width, device=padded.device)
    columns = draw.left[:, None] + torch.where(draw.flip[:, None], width - 1 - columns, columns)
    starts = (index[:, None] * padded_height + rows) * padded_width
    pixels = starts[:, :, None] + columns[:, None, :]
    # On a CPU four times as fast as indexing by (image, row, column), which reads three indices per pixel.
    return padded.view(-1, channels).index_select(0, pixels.view(-1)).view(-1, height, width, channels)


class Normalize:
    """Converts uint8 images ``(B, H, W, 3)`` to normalised float32 ``(B, 3, H, W)`` in the device's layout.

    The layout is ``channels_last``, except on Apple's GPUs (:func:`~rld_lightning.mps.image_layout`).

    Computes ``(x / 255 - mean) / std`` in this order and precision: on a CPU and on CUDA bit-identical to torchvision's
    ``ToTensor`` followed by ``Normalize``.

    Args:
        mean: mean of each channel, for values in [0, 1].
        std: standard deviation of each channel.
        height: H.
        width: W.
        device: device of the images.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], height: int, width: int, device: Device = "cpu"
    ) -> None:
        # One value per pixel: broadcasting three channels over the last axis is four times slower on a CPU.
        shape = (height, width, len(mean))
        self.mean = torch.tensor(mean, device=device).expand(shape).contiguous()
        self.std = torch.tensor(std, device=device).expand(shape).contiguous()
        # A tensor on the device, because CUDA divides by a Python number through its rounded reciprocal.
        self.scale = torch.tensor(255.0, device=device)
        self.layout = image_layout(torch.device(device))

    def __call__(self, images: Tensor) -> Tensor:
        """Normalises a batch, without synchronising with the device."""
        normalised = images.float().div_(self.scale).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)
        return normalised.contiguous(memory_format=self.layout)
