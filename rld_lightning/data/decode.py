"""Turning the bytes of an image file into uint8 RGB.

torchvision's own decoders need less time than Pillow for JPEG, PNG, WebP and GIF files, and give the same pixels, bit
for bit. Pillow reads what they do not: other formats, animations, and a JPEG at a fraction of its size. Since 0.29
torchvision announces that its decoders will move to TorchCodec; where they are gone, Pillow reads everything.
"""

from io import BytesIO

import numpy as np
import torch
import torchvision.io
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

DECODERS = ("auto", "pil", "cuda")
# What the JPEG library can scale by while it decodes, for a fraction of the time.
REDUCTIONS = (8, 4, 2)

_torchvision_decode = getattr(torchvision.io, "decode_image", None)


class BadImageError(ValueError):
    """An image that cannot be read; its text is the reason."""


def read_file(path: str) -> Tensor:
    """The bytes of a file, uint8 ``(N,)``.

    Raises:
        BadImageError: the file cannot be read.
    """
    try:
        return torch.from_numpy(np.fromfile(path, np.uint8))
    except OSError as error:
        raise BadImageError(str(error)) from error


def decode_image(content: Tensor, decoder: str = "auto", reduction: int = 1) -> Tensor:
    """Decodes an image of any mode of 8 bits (grey, palette, alpha, CMYK).

    Args:
        content: the bytes of the file, uint8 ``(N,)``.
        decoder: ``"pil"`` for Pillow alone, otherwise torchvision where it can.
        reduction: what to divide height and width by, one of :data:`REDUCTIONS` or 1, if the file is a JPEG.

    Returns:
        RGB values, uint8 ``(3, H, W)``; the first image of an animation.

    Raises:
        BadImageError: there is no such image in the bytes.
    """
    if _torchvision_decode is not None and decoder != "pil" and reduction == 1:
        try:
            image = _torchvision_decode(content, mode="RGB")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass  # not one of its formats, or damaged: Pillow reads it, or says what is wrong
        else:
            if image.dtype == torch.uint8:
                return image if image.ndim == 3 else image[0]
    return _decode_with_pillow(content, reduction)


def read_image(path: str, decoder: str = "auto") -> Tensor:
    """Reads an image file as uint8 RGB ``(3, H, W)``; see :func:`decode_image`.

    Raises:
        ValueError: the file cannot be read as an image.
    """
    try:
        return decode_image(read_file(path), decoder)
    except BadImageError as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): replace or delete it.") from error


def decode_jpegs(contents: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decodes JPEG files on a device, with nvJPEG on a GPU.

    Args:
        contents: the bytes of each file, uint8 ``(N,)``, on the CPU.
        device: where to decode.

    Returns:
        RGB values of each, uint8 ``(3, H, W)``, on the device; ``None`` for one that cannot be decoded there.
    """
    if not contents:
        return []
    try:
        return torchvision.io.decode_jpeg(contents, mode="RGB", device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if len(contents) == 1:
            return [None]
        # One bad file fails the whole batch.
        return [decode_jpegs([content], device)[0] for content in contents]


def jpeg_size(content: Tensor) -> tuple[int, int] | None:
    """Height and width from the header of a JPEG file, ``None`` for what does not look like one."""
    data = content.numpy().data
    if bytes(data[:2]) != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            return int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


def _decode_with_pillow(content: Tensor, reduction: int) -> Tensor:
    try:
        with Image.open(BytesIO(content.numpy().data)) as image:
            if image.mode.startswith(("I", "F")):  # which Pillow would clip to white
                raise BadImageError(f"mode {image.mode} has more than 8 bits a channel")
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
            return pil_to_tensor(image.convert("RGB"))
    except (BadImageError, MemoryError):
        raise
    # Damaged files make Pillow's readers raise almost anything: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        reason = str(error) if content.numel() else "the file is empty"
        raise BadImageError(reason.split(" <_io.")[0] or type(error).__name__) from error
