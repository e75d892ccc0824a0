"""Batched crop, flip and normalisation of uint8 images that live on the training device.

Images are stored NHWC, so that a pixel is three neighbouring bytes: a batch is cropped, flipped and gathered in one
``index_select`` of pixels, and the permuted result is in ``channels_last`` memory format at no cost.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Device = torch.device | str


class CropFlip(NamedTuple):
    """Where each of N samples is cropped from its padded image, and whether the crop is mirrored.

    ``top`` and ``left`` are ``(N,)`` int64 in [0, 2 * padding], ``flip`` is ``(N,)`` bool.
    """

    top: Tensor
    left: Tensor
    flip: Tensor


def pad_images(images: Tensor, padding: int) -> Tensor:
    """Surrounds uint8 images ``(N, H, W, 3)`` with ``padding`` black pixels on each side."""
    return F.pad(images, (0, 0, padding, padding, padding, padding))


def draw_crop_flip(size: int, *, padding: int, flip: bool, generator: torch.Generator) -> CropFlip:
    """Draws uniform crop offsets and, if ``flip``, fair coin flips for ``size`` samples from a CPU generator."""
    top, left = torch.randint(2 * padding + 1, (2, size), generator=generator)
    coin = torch.randint(2, (size,), generator=generator).bool()
    return CropFlip(top, left, coin if flip else torch.zeros_like(coin))


def count_views(padding: int, flip: bool) -> int:
    """How many crops, mirrored or not, there are of one image."""
    return (2 * padding + 1) ** 2 * (2 if flip else 1)


def number_views(draw: CropFlip, padding: int, flip: bool) -> Tensor:
    """Which of the :func:`count_views` of its image each sample is, int64 ``(N,)``."""
    place = draw.top * (2 * padding + 1) + draw.left
    return 2 * place + draw.flip if flip else place


def view_of_number(number: Tensor, padding: int, flip: bool) -> CropFlip:
    """The crop and flip that :func:`number_views` numbers so, ``(N,)`` each."""
    place = number // 2 if flip else number
    mirrored = number % 2 == 1 if flip else torch.zeros_like(number, dtype=torch.bool)
    return CropFlip(place // (2 * padding + 1), place % (2 * padding + 1), mirrored)


def crop_flip(padded: Tensor, index: Tensor, draw: CropFlip, height: int, width: int) -> Tensor:
    """Gathers a batch of images, each cropped and perhaps mirrored as drawn.

    The same as torchvision's ``RandomCrop(size, padding)`` followed by ``RandomHorizontalFlip``, given the same draws.

    Args:
        padded: all images, uint8 ``(N, H + 2p, W + 2p, C)``, contiguous.
        index: which images to take, int64 ``(B,)``.
        draw: the offsets and flips of these B samples.
        height: H, the rows of a crop.
        width: W, the columns of a crop.

    Returns:
        the crops, uint8 ``(B, H, W, C)``.
    """
    _, padded_height, padded_width, channels = padded.shape
    rows = draw.top[:, None] + torch.arange(height, device=padded.device)
    columns = torch.arange(width, device=padded.device)
    columns = draw.left[:, None] + torch.where(draw.flip[:, None], width - 1 - columns, columns)
    starts = (index[:, None] * padded_height + rows) * padded_width
    pixels = starts[:, :, None] + columns[:, None, :]
    # Four times as fast on a CPU as indexing by (image, row, column), where each pixel costs three index reads.
    return padded.view(-1, channels).index_select(0, pixels.view(-1)).view(-1, height, width, channels)


class Normalize:
    """Turns uint8 images ``(B, H, W, 3)`` into normalised float32 ``(B, 3, H, W)`` in ``channels_last`` memory format.

    ``(x / 255 - mean) / std`` in this order and precision: on every device bit-identical to torchvision's ``ToTensor``
    followed by ``Normalize``.

    Args:
        mean: mean of each channel, for values in [0, 1].
        std: standard deviation of each channel.
        height: H.
        width: W.
        device: where the images are.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], height: int, width: int, device: Device = "cpu"
    ) -> None:
        # One value for each pixel: broadcasting three channels over the last axis is four times slower on a CPU.
        shape = (height, width, len(mean))
        self.mean = torch.tensor(mean, device=device).expand(shape).contiguous()
        self.std = torch.tensor(std, device=device).expand(shape).contiguous()
        # A tensor on the device, because CUDA divides by a Python number through its rounded reciprocal.
        self.scale = torch.tensor(255.0, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalises a batch; no value is read back from the device."""
        return images.float().div_(self.scale).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)
