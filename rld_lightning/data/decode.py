"""Decodes image files to uint8 RGB.

torchvision's decoders are faster than Pillow for JPEG and WebP files, with the same pixels, bit for bit. Pillow reads
everything else: other formats, animations, and JPEGs at reduced size. PNG is among them although torchvision would take
a sixth less time, since one wrong bit in the pixels of a PNG crashes torchvision 0.29, and the process, with a
segmentation fault. Since 0.29 torchvision announces that its decoders will move to TorchCodec; if they are missing,
Pillow reads everything.

The code below always reads the header first, for the number of pixels, before any is allocated, and for the EXIF
orientation, which none of the decoders applies.
"""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
import torchvision.io
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

DECODERS = ("auto", "pil", "cuda")
# Factors by which the JPEG library can reduce the size while decoding, which saves time.
REDUCTIONS = (8, 4, 2)
# A small file can claim any size. The largest cameras have 102 (medium format) and 108 (phones) million pixels.
MOST_PIXELS = 128_000_000
# No panorama is longer; Pillow takes three times the memory for lines of one pixel.
_LONGEST_SIDE = 1 << 17
_MOST_PNG_CHUNKS = 1 << 16  # a chunk usually has 8 KB of pixels
# The size of MOST_PIXELS as uncompressed 16-bit RGBA: a longer file would not be decoded.
MOST_BYTES = 8 * MOST_PIXELS
# Formats that Pillow may read. It supports more, such as EPS, which is a program that it would run in Ghostscript.
FORMATS = frozenset(
    ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
)
# How much of a JPEG file is searched for its size, which a malicious file may place after any number of fill bytes.
_MOST_HEADER_BYTES = 1 << 24
_TORCHVISION_FORMATS = ("JPEG", "WEBP")
_ORIENTATION = 0x0112  # the EXIF tag
# For each orientation except 1: whether to transpose, and which dimensions to flip afterwards.
_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}


class BadImageError(ValueError):
    """Raised for an image that cannot be read; the message is the reason."""


class Header(NamedTuple):
    """The header of an image file.

    ``height`` and ``width`` are those of the displayed image, after applying ``orientation`` (1 to 8, as in EXIF) to
    the stored one.
    """

    format: str
    height: int
    width: int
    orientation: int


def read_file(path: str) -> Tensor:
    """Reads the bytes of a regular file, uint8 ``(N,)``.

    Raises:
        BadImageError: the file cannot be read, is a pipe or a device, or is longer than ``MOST_BYTES``.
    """
    try:
        # Otherwise opening a pipe would wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError("it is not a regular file")
            if status.st_size > MOST_BYTES:
                raise BadImageError(f"its {status.st_size:,} bytes are more than the {MOST_BYTES:,} of any image")
            return torch.from_numpy(np.fromfile(file, np.uint8))
    except OSError as error:
        raise BadImageError(str(error)) from error


def read_header(content: Tensor) -> Header:
    """Reads an image's format, size and orientation, without decoding it.

    Args:
        content: the bytes of the file, uint8 ``(N,)``.

    Raises:
        BadImageError: the bytes are not an image, or one of more than ``MOST_PIXELS``.
    """
    data = content.numpy().tobytes()
    header = _jpeg_header(data[:_MOST_HEADER_BYTES]) or _png_header(data)
    if header is None:
        with _pillow_errors(data), _open(data) as image:
            _check_size(image.height, image.width)
            # Pillow itself applies a TIFF file's orientation when loading it.
            exif = b"" if image.format == "TIFF" else image.info.get("exif", b"")
            header = _turned_header(str(image.format), image.height, image.width, _exif_orientation(exif))
    _check_size(header.height, header.width)
    return header


def decode_image(content: Tensor, decoder: str = "auto", reduction: int = 1, header: Header | None = None) -> Tensor:
    """Decodes an image of any 8-bit mode (grey, palette, alpha, CMYK), or of 16 bits, of which the upper 8 are kept.

    Args:
        content: the bytes of the file, uint8 ``(N,)``.
        decoder: ``"pil"`` for Pillow only, otherwise torchvision where possible.
        reduction: divisor of height and width for JPEG files, one of :data:`REDUCTIONS` or 1.
        header: the result of :func:`read_header`, if it was called before.

    Returns:
        RGB values, uint8 ``(3, H, W)``, with the EXIF orientation applied; of an animation the first image.

    Raises:
        BadImageError: the bytes are not such an image, or one of more than ``MOST_PIXELS``.
    """
    if header is None:
        header = read_header(content)
    image = None
    if decoder != "pil" and reduction == 1 and header.format in _TORCHVISION_FORMATS:
        image = _decode_with_torchvision(content)
    if image is None:
        image = _decode_with_pillow(content, reduction)
    return turn(image, header.orientation)


def turn(image: Tensor, orientation: int) -> Tensor:
    """Applies the EXIF orientation (1 to 8) of its file to an image ``(..., H, W)``."""
    if orientation == 1:
        return image
    transpose, flips = _TURNS[orientation]
    return (image.transpose(-2, -1) if transpose else image).flip(flips)


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
        device: the device to decode on.

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


def _decode_with_torchvision(content: Tensor) -> Tensor | None:
    try:
        image = torchvision.io.decode_image(content, mode="RGB")
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None  # an animation, or damaged: Pillow reads it or reports the error
    return image if image.dtype == torch.uint8 and image.ndim == 3 else None


def _decode_with_pillow(content: Tensor, reduction: int) -> Tensor:
    data = content.numpy().tobytes()
    with _pillow_errors(data), _open(data) as image:
        if reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
        # Pillow would clip 16 bits to white. PNG and PPM have at most 16 bits, even if Pillow's mode is "I".
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            grey = torch.from_numpy((np.asarray(image) >> 8).astype(np.uint8))
            return grey.expand(3, *grey.shape).contiguous()
        if image.mode.startswith(("I", "F")):
            raise BadImageError(f"mode {image.mode} has more than 16 bits a channel")
        return pil_to_tensor(image.convert("RGB"))


def _open(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    if image.format not in FORMATS:
        raise BadImageError(f"the format {image.format} is not supported")
    return image


@contextmanager
def _pillow_errors(data: bytes) -> Iterator[None]:
    try:
        with warnings.catch_warnings():  # our own limit of pixels raises an error instead; damaged tags do not matter
            warnings.simplefilter("ignore")
            yield
    except (BadImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(f"more than {MOST_PIXELS:,} pixels") from error
    # Pillow raises almost anything for damaged files: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        reason = str(error) if data else "the file is empty"
        raise BadImageError(reason.split(" <_io.")[0] or type(error).__name__) from error


def _jpeg_header(data: bytes) -> Header | None:
    """Reads the header of a JPEG file like the JPEG library; ``None`` if it does not look like one."""
    if data[:2] != b"\xff\xd8":
        return None
    at, exif = 2, b""
    while (at := data.find(b"\xff", at)) >= 0:
        while data[at : at + 1] == b"\xff":
            at += 1
        marker = int.from_bytes(data[at : at + 1])
        at += 1
        if marker <= 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a segment
            continue
        if marker in (0xD9, 0xDA):  # the end, or pixels before their size
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            if len(data) < at + 7:
                return None
            height, width = int.from_bytes(data[at + 3 : at + 5]), int.from_bytes(data[at + 5 : at + 7])
            return _turned_header("JPEG", height, width, _exif_orientation(exif))
        size = int.from_bytes(data[at : at + 2])
        if marker == 0xE1 and not exif and data[at + 2 : at + 8] == b"Exif\0\0":
            exif = data[at + 2 : at + size]
        at += max(size, 2)
    return None


def _png_header(data: bytes) -> Header | None:
    """Reads the header of a PNG file; ``None`` if it does not look like one."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 24:
        return None
    at, chunks = 8, 0
    while data[at + 4 : at + 8] not in (b"", b"eXIf"):  # eXIf may be before or after the pixels
        at += 12 + int.from_bytes(data[at : at + 4])
        if (chunks := chunks + 1) > _MOST_PNG_CHUNKS:  # each costs Pillow more than a memory page of pixels
            raise BadImageError(f"it has more than {_MOST_PNG_CHUNKS:,} chunks")
    exif = data[at + 8 : at + 8 + int.from_bytes(data[at : at + 4])]
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    return _turned_header("PNG", height, width, _exif_orientation(exif))


def _exif_orientation(exif: bytes) -> object:
    if not exif:
        return None
    # For damaged tags Pillow warns or raises almost anything; the image can still be used.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parsed = Image.Exif()
            parsed.load(exif)
            return parsed.get(_ORIENTATION)
        except Exception:
            return None


def _turned_header(name: str, height: int, width: int, orientation: object) -> Header:
    if not isinstance(orientation, int) or orientation not in _TURNS:
        return Header(name, height, width, 1)
    if _TURNS[orientation][0]:
        height, width = width, height
    return Header(name, height, width, orientation)


def _check_size(height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise BadImageError(f"its {width:,} x {height:,} pixels are more than the limit of {MOST_PIXELS:,}")
    if max(height, width) > _LONGEST_SIDE:
        raise BadImageError(f"its {width:,} x {height:,} pixels are longer than {_LONGEST_SIDE:,}")
