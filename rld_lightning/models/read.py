"""Weights from every kind of file users have, read without executing anything.

A pickled checkpoint can run arbitrary code when it is unpickled, so pickles go through
``torch.load(weights_only=True)`` with a short list of harmless extra classes, and whatever else a file asks for is
refused by name.
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
from pathlib import Path
from typing import IO, Any, TypeGuard

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rld_lightning.errors import some
from rld_lightning.models.seal import is_damaged, without_seal

# The reconstructor is taken from an instance, because numpy 2 moved it: old files name it by its old path.
_NUMPY_SCALAR = np.float64(0.0).__reduce__()[0]
_NUMPY_SCALAR_PATHS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")

# What published checkpoints hold beside tensors: the command line they were trained with, and a numpy accuracy.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *((_NUMPY_SCALAR, path) for path in _NUMPY_SCALAR_PATHS),
    *(type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64")),
]


class WeightsError(ValueError):
    """A weights file that cannot be used; the message says which, why, and what to do about it."""


@dataclass(frozen=True)
class Weights:
    """A state_dict and where it came from.

    Attributes:
        state_dict: tensors by key.
        metadata: what a safetensors header or a Lightning checkpoint's hyper-parameters say, else empty.
        source: the file.
        sha256: of the file, as hexadecimal digits; empty where there is none.
    """

    state_dict: dict[str, Tensor]
    metadata: dict[str, str]
    source: Path
    sha256: str = ""


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Reads the weights in a file, on the CPU, whatever its format; the file's content decides, not its suffix.

    Understood are safetensors, Lightning checkpoints (of which the student is taken), dictionaries with a state_dict
    under ``"model"`` or ``"state_dict"``, and plain state_dicts, zipped or in the format before torch 1.6. The prefixes
    of ``DataParallel`` and ``torch.compile`` are removed from the keys.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is not a weights file, is damaged, or would have to execute code to be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no weights file at {path}")
    if not path.is_file():
        raise WeightsError(f"{path} is not a file; give the weights file itself")
    content = read_once(path)
    if is_damaged(content):
        raise WeightsError(
            f"{path} is damaged: its bytes are not those that were written, by its checksum; take a copy of it, or "
            "make it again"
        )
    # A safetensors file is the length of its header in eight bytes, then the header, which is JSON.
    if path.suffix == ".safetensors" or content[8:9] == b"{":
        weights = _read_safetensors(content, path)
    else:
        weights = read_checkpoint(BytesIO(content), source=path)
    return replace(weights, sha256=hashlib.sha256(content).hexdigest())


def read_once(path: Path) -> bytes:
    """The bytes of a file as they are at one moment, whoever puts another one in its place meanwhile.

    Raises:
        WeightsError: somebody writes into it, over and over.
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
        WeightsError: the file is not whole.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return without_seal(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is not a complete safetensors file ({error})") from error


def _read_safetensors(content: bytes, path: Path) -> Weights:
    try:
        state_dict = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is not a complete safetensors file ({error})") from error
    if not state_dict:
        raise WeightsError(f"{path} holds no tensors")
    # Where the library has read the header, it is sound.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return Weights(_plain_keys(state_dict), without_seal(header.get("__metadata__") or {}), path)


def read_checkpoint(file: IO[bytes], source: str | Path) -> Weights:
    """Reads the weights in an open ``torch.save``d file; ``source`` is what error messages call it.

    Raises:
        WeightsError: as ``read_weights``.
    """
    if not file.read(1):
        raise WeightsError(f"{source} is empty")
    file.seek(0)
    # Not those that someone else has allowed: leaving the context would disallow them.
    allowed = torch.serialization.get_safe_globals()
    try:
        with torch.serialization.safe_globals([extra for extra in _SAFE_GLOBALS if extra not in allowed]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise WeightsError(_explain_load_failure(error, source)) from error
    return Weights(_find_state_dict(content, source), _hyper_parameters(content), Path(source))


def _hyper_parameters(content: object) -> dict[str, str]:
    """What a Lightning checkpoint was made with, such as the student's name."""
    values = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    return {str(key): str(value) for key, value in values.items()} if isinstance(values, Mapping) else {}


def _explain_load_failure(error: Exception, source: str | Path) -> str:
    refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
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


def _find_state_dict(content: object, source: str | Path) -> dict[str, Tensor]:
    found = f"is a {type(content).__name__}"
    if isinstance(content, Mapping):
        if _is_state_dict(candidate := content.get("state_dict")):
            return _student_of(_plain_keys(candidate))
        for candidate in (content.get("model"), content):
            if _is_state_dict(candidate):
                return _plain_keys(candidate)
        found = f"has the keys {some(map(repr, content))}" if content else "is empty"
    raise WeightsError(f"{source} holds no state_dict: it {found}, with tensors neither there nor under 'model'")


def _is_state_dict(candidate: object) -> TypeGuard[Mapping[str, Tensor]]:
    return (
        isinstance(candidate, Mapping)
        and bool(candidate)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in candidate.items())
    )


def _plain_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undoes ``torch.compile``, which may have wrapped any submodule, and ``DataParallel``, which wraps all of it."""
    uncompiled = {key.replace("_orig_mod.", ""): value for key, value in state_dict.items()}
    return _strip(uncompiled, "module.")


def _student_of(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes the model out of a Lightning module's state_dict, which may hold losses and a teacher as well."""
    taken = {key: value for key, value in state_dict.items() if key.startswith("student.")} or state_dict
    prefix = next((p for p in ("student.", "model.", "net.") if all(key.startswith(p) for key in taken)), "")
    return _strip(_strip(taken, prefix), "module.")


def _strip(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Removes a prefix from all keys, if all keys have it."""
    if not all(key.startswith(prefix) for key in state_dict):
        return state_dict
    return {key.removeprefix(prefix): value for key, value in state_dict.items()}
