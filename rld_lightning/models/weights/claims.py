"""Files that claim to hold more than they do, refused before memory is given to the claim.

A few bytes can say of themselves that they unpack to gigabytes: entries of an archive that are compressed, or lie one
over the other; tensors that show one number a trillion times; a list of lists that each stand in the next ten times.
"""

import zipfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from rld_lightning.models.weights.pickled import bomb_in

_STRETCHED = 1 << 24  # bytes that a tensor may show beyond those that it has, as a buffer that was expanded does
_OLD_PICKLES = 5
_MOST_VALUES = 100_000  # of a list that is a fact


class ClaimError(ValueError):
    """A file that claims more than it holds; its text says what."""


def load_plainly(content: bytes, map_location: Any = "cpu") -> Any:
    """What ``torch.load(weights_only=True)`` makes of a file's content.

    Raises:
        ClaimError: it claims more than it holds; PyTorch raises almost anything of what is damaged.
    """
    if _is_inflated(content):
        raise ClaimError("it claims to unpack to more than it holds; torch.save compresses nothing")
    if wrong := _bomb_in(content):
        raise ClaimError(wrong)
    found = torch.load(BytesIO(content), map_location=map_location, weights_only=True)
    for tensor in _tensors(found):
        if tensor.layout != torch.strided or tensor.is_meta or _shown(tensor) > _held(tensor) + _STRETCHED:
            raise ClaimError(
                f"a tensor of {tuple(tensor.shape)} in it has not all of these values; tensors have to be dense and "
                "contiguous"
            )
    return found


def as_text(value: object) -> str:
    """A plain value, or a list of some, as a text; ``"a dict"`` of what else there is, whose text may have no end."""
    if isinstance(value, list | tuple) and len(value) <= _MOST_VALUES and all(map(_is_plain, value)):
        return str(list(value))
    return str(value) if _is_plain(value) else f"a {type(value).__name__}"


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | Number)


def _bomb_in(content: bytes) -> str:
    """What is wrong with the pickle in a file, as PyTorch finds it there; nothing where it may be read."""
    if content[:4] != b"PK\x03\x04":  # a file of before torch 1.6: what it is, the content, and where storages are
        return bomb_in(BytesIO(content), _OLD_PICKLES)
    try:
        reader: Any = torch._C.PyTorchFileReader(BytesIO(content))  # whose types are not all declared
        return bomb_in(BytesIO(reader.get_record("data.pkl"))) if reader.has_record("data.pkl") else ""
    except RuntimeError:  # no archive to PyTorch, which says so
        return ""


def _is_inflated(content: bytes) -> bool:
    """Whether the entries of an archive would take more than the archive does; PyTorch compresses none."""
    if not zipfile.is_zipfile(BytesIO(content)):
        return False
    with zipfile.ZipFile(BytesIO(content)) as archive:
        return sum(entry.file_size for entry in archive.infolist()) > len(content)


def _shown(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _held(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _tensors(content: object) -> Iterator[Tensor]:
    """All tensors in nested mappings and lists, which may hold each other."""
    seen, waiting = set[int](), [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, Mapping) else value
