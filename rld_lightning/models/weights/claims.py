"""Refuses decompression bombs: files that would unpack to far more memory than they take.

A few bytes can claim gigabytes: by compressed or overlapping entries of an archive, by expanded tensors that repeat one
number a trillion times, or by lists that contain another list ten times, which contains another ten times, and so on.
"""

import zipfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from rld_lightning.models.weights.pickled import pickle_fault

_STRETCHED = 1 << 24  # bytes by which a tensor's size may exceed its storage, as an expanded buffer's does
_OLD_PICKLES = 5  # pickles in a file in the format before torch 1.6
_MOST_VALUES = 100_000  # of a list in the metadata


class ClaimError(ValueError):
    """Raised for a file that claims more than it holds; the message says what."""


def load_safely(content: bytes, map_location: Any = "cpu") -> Any:
    """Loads a file's content with ``torch.load(weights_only=True)``, after checking that it is no bomb.

    Raises:
        ClaimError: it claims more than it holds. For damaged files PyTorch may raise any other type.
    """
    if _is_inflated(content):
        raise ClaimError("it claims to unpack to more than it holds; torch.save compresses nothing")
    if wrong := _pickle_fault(content):
        raise ClaimError(wrong)
    loaded = torch.load(BytesIO(content), map_location=map_location, weights_only=True)
    for tensor in tensors_in(loaded):
        if (
            tensor.layout != torch.strided
            or tensor.is_meta
            or tensor.nbytes > tensor.untyped_storage().nbytes() + _STRETCHED
        ):
            raise ClaimError(
                f"a tensor of {tuple(tensor.shape)} in it has not all of these values; tensors have to be dense and "
                "contiguous"
            )
    return loaded


def as_text(value: object) -> str:
    """Converts a plain value or a list of them to text; others, whose text may be endless, to ``"a dict"`` etc."""
    if isinstance(value, list | tuple) and len(value) <= _MOST_VALUES and all(map(_is_plain, value)):
        return str(list(value))
    return str(value) if _is_plain(value) else f"a {type(value).__name__}"


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | Number)


def _pickle_fault(content: bytes) -> str:
    """Returns what is wrong with the pickle that PyTorch would read from a file; empty if it may be read."""
    if content[:4] != b"PK\x03\x04":  # the format before torch 1.6: several pickles in a row
        return pickle_fault(BytesIO(content), _OLD_PICKLES)
    try:
        reader: Any = torch._C.PyTorchFileReader(BytesIO(content))  # not fully typed
        return pickle_fault(BytesIO(reader.get_record("data.pkl"))) if reader.has_record("data.pkl") else ""
    except RuntimeError:  # no archive; torch.load will report it
        return ""


def _is_inflated(content: bytes) -> bool:
    """Whether an archive's entries unpack to more than its size; PyTorch's are never compressed."""
    if not zipfile.is_zipfile(BytesIO(content)):
        return False
    with zipfile.ZipFile(BytesIO(content)) as archive:
        return sum(entry.file_size for entry in archive.infolist()) > len(content)


def tensors_in(content: object) -> Iterator[Tensor]:
    """Yields all tensors in nested mappings and lists, which may contain each other."""
    seen, waiting = set[int](), [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, Mapping) else value
