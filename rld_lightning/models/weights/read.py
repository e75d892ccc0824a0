"""Reads weights from all common file formats, without executing anything.

Unpickling a checkpoint can run arbitrary code, so pickles are read with ``torch.load(weights_only=True)`` and a short
list of harmless extra classes; anything else that a file asks for is refused by name.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rld_lightning.errors import first_line, some
from rld_lightning.models.weights.claims import ClaimError, as_text, load_safely
from rld_lightning.models.weights.seal import is_damaged, without_seal
from rld_lightning.models.weights.unpack import Part, find_parts, usual_keys, wanted_parts

RUN_WEIGHTS = "student.safetensors"  # in a run directory
HUB_WEIGHTS = "model.safetensors"  # in the folder of an export, as on the Hugging Face Hub

# The reconstructor is read from an instance, because numpy 2 moved it; old files refer to its old path.
_NUMPY_SCALAR = np.float64(0.0).__reduce__()[0]
_NUMPY_SCALAR_PATHS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_NUMPY_KINDS = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_MOST_SHOWN = 150  # characters of a library's message
_POSIX = ("PosixPath", "PurePosixPath")
_WINDOWS = ("WindowsPath", "PureWindowsPath")


def _without_default(*_: object) -> dict[Any, Any]:
    """Returns a plain dictionary in place of a ``defaultdict``, since torch fills no other kind."""
    return {}


# What checkpoints hold beside tensors: the command line of the training, paths, a numpy accuracy, a history. These
# classes only store their arguments. Paths of any system are read; Python 3.13 moved their classes.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    SimpleNamespace,
    (_without_default, "collections.defaultdict"),
    *(list, dict, int, float, str),  # default factories of a defaultdict
    *((PurePosixPath, f"pathlib{module}.{name}") for module in ("", "._local") for name in _POSIX),
    *((PureWindowsPath, f"pathlib{module}.{name}") for module in ("", "._local") for name in _WINDOWS),
    np.dtype,
    *((_NUMPY_SCALAR, path) for path in _NUMPY_SCALAR_PATHS),
    *(type(np.dtype(name)) for name in _NUMPY_KINDS),
]


class WeightsError(ValueError):
    """Raised for a weights file that cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Weights:
    """A state_dict and where it came from."""

    state_dict: dict[str, Tensor]  # tensors by key
    metadata: dict[str, str]  # of the safetensors header or of a Lightning checkpoint's hyper-parameters, else empty
    source: Path  # the file
    sha256: str = ""  # hexadecimal SHA-256 of the file; empty if there is no file
    parts: tuple[Part, ...] = ()  # every state_dict in the file, the likeliest first, with the file's own keys
    other_entries: tuple[str, ...] = ()  # names of the file's other entries
    account: str = ""  # which parts were used and which were not, in words; empty if there is nothing to report


def split_part(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """Splits ``"best.pth::state_dict_ema"`` into the file and the requested part.

    For a run directory or the folder of an export, returns the weights file in it.
    """
    whole = Path(path).expanduser()
    named, colons, part = str(whole).rpartition("::")
    file, part = (Path(named), part) if colons and not whole.exists() else (whole, "")
    inside = (file / name for name in (RUN_WEIGHTS, HUB_WEIGHTS))
    return next((weights for weights in inside if weights.is_file()), file), part


def existing_part(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """Same as :func:`split_part`, and checks that the file exists.

    Raises:
        FileNotFoundError: it does not.
    """
    file, part = split_part(path)
    if not file.exists():
        raise FileNotFoundError(f"there is no weights file at {file}")
    if file.is_dir():
        raise FileNotFoundError(
            f"{file} holds neither {RUN_WEIGHTS}, as the directory of a finished run does, nor {HUB_WEIGHTS}, as an "
            "export does; of a run that is not finished, name its best.ckpt or last.ckpt"
        )
    return file, part


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Reads the weights in a file onto the CPU; the format is detected from the content, not from the suffix.

    Supported are safetensors, Lightning checkpoints (of which the student is read), dictionaries with a state_dict
    under ``"model"``, ``"state_dict"`` or another usual name, and plain state_dicts, zipped or in the format before
    torch 1.6. The prefixes of ``DataParallel`` and ``torch.compile`` are removed from the keys.

    Args:
        path: the file, a run directory or the folder of an export. ``::`` and the name of a state_dict in the file, or
            a prefix of its keys, selects that part.

    Raises:
        FileNotFoundError: there is no such file, or no weights file in the folder.
        WeightsError: it is not a weights file, is damaged, could only be read by executing code, or has no such part.
    """
    path, wanted = existing_part(path)
    if not path.is_file():
        raise WeightsError(f"{path} is not a file; give the weights file itself")
    content = read_once(path)
    if is_damaged(content):
        raise WeightsError(
            f"{path} is damaged: its checksum does not match its content; use a copy of it, or create it again"
        )
    # A safetensors file is the length of its header in eight bytes, then the header, which is JSON.
    if path.suffix == ".safetensors" or content[8:9] == b"{":
        weights = _read_safetensors(content, path)
    else:
        weights = read_torch_weights(BytesIO(content), source=path)
    weights = replace(weights, sha256=hashlib.sha256(content).hexdigest())
    return _part_of(weights, wanted) if wanted else weights


def _part_of(weights: Weights, wanted: str) -> Weights:
    chosen = wanted_parts(list(weights.parts), wanted)
    if not chosen:
        names = [part.path for part in weights.parts if part.path]
        raise WeightsError(
            f"{weights.source} has no weights under {wanted!r}; it has {some(map(repr, names)) or 'no parts by name'}"
        )
    return replace(weights, state_dict=usual_keys(chosen[0]), parts=tuple(chosen), other_entries=())


def read_once(path: Path) -> bytes:
    """Reads a file in a consistent state, even if it is replaced meanwhile.

    Raises:
        WeightsError: the file is still being written to after three attempts.
    """
    for _ in range(3):
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            content = file.read()
            after = os.fstat(file.fileno())
        if (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, len(content)):
            return content
    raise WeightsError(f"{path} is being written to; wait until it is complete")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads the metadata of a safetensors file without reading its tensors.

    Raises:
        WeightsError: the file is incomplete.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return without_seal(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is not a complete safetensors file ({_in_short(error)})") from error


def _in_short(error: BaseException) -> str:
    """A library's message, which may quote the file at any length."""
    return first_line(error)[:_MOST_SHOWN]


def _read_safetensors(content: bytes, path: Path) -> Weights:
    try:
        state_dict = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is not a complete safetensors file ({_in_short(error)})") from error
    if not state_dict:
        raise WeightsError(f"{path} holds no tensors")
    # The library has read the header, so it is valid.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    parts = find_parts(state_dict)
    return Weights(usual_keys(parts[0]), without_seal(header.get("__metadata__") or {}), path, parts=tuple(parts))


def read_torch_weights(file: IO[bytes], source: str | Path) -> Weights:
    """Reads the weights in an open ``torch.save``d file; ``source`` is its name in error messages.

    Raises:
        WeightsError: as for ``read_weights``.
    """
    if not file.read(1):
        raise WeightsError(f"{source} is empty")
    file.seek(0)
    # Without those already allowed elsewhere, which leaving the context would disallow.
    allowed = torch.serialization.get_safe_globals()
    try:
        with torch.serialization.safe_globals([extra for extra in _SAFE_GLOBALS if extra not in allowed]):
            content = load_safely(file.read())
    except Exception as error:  # a damaged pickle can raise anything
        raise WeightsError(_explain_load_failure(error, source)) from error
    parts = find_parts(content)
    if not parts:
        found = f"is a {type(content).__name__}"
        if isinstance(content, Mapping):
            found = f"has the keys {some(map(repr, content))}" if content else "is empty"
        raise WeightsError(f"{source} holds no state_dict: it {found}, with tensors neither there nor under 'model'")
    named = {part.path.partition(".")[0] for part in parts}
    other_entries = (
        () if named == {""} or not isinstance(content, Mapping) else tuple(str(k) for k in content if k not in named)
    )
    return Weights(
        usual_keys(parts[0]), hyper_parameters(content), Path(source), parts=tuple(parts), other_entries=other_entries
    )


def hyper_parameters(content: object) -> dict[str, str]:
    """Returns a Lightning checkpoint's hyper-parameters, such as the student's name, as texts; else an empty dict."""
    values = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    return {as_text(key): as_text(value) for key, value in values.items()} if isinstance(values, Mapping) else {}


def _explain_load_failure(error: Exception, source: str | Path) -> str:
    refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if isinstance(error, ClaimError):
        return f"{source} was refused: {error}"
    if refused is None:
        return (
            f"{source} is neither a safetensors file nor a PyTorch checkpoint that can be read without executing it; "
            f"it may be damaged or cut short ({type(error).__name__})"
        )
    return (
        f"{source} was refused: it wants to run or build {refused[1]!r}, which is more than weights; nothing of it was "
        "executed. If you trust the file, open it where it was made and save its state_dict with "
        "`safetensors.torch.save_file`"
    )
