"""Weights from every kind of file users have, read without executing anything, and written as safetensors.

A pickled checkpoint can run arbitrary code when it is unpickled, so pickles go through
``torch.load(weights_only=True)`` with a short list of harmless extra classes, and whatever else a file asks for is
refused by name.
"""

import argparse
import json
import os
import pickle
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from rld_lightning.models.factory import create_model, list_models
from rld_lightning.models.taps import unwrap

# The reconstructor is taken from an instance, because numpy 2 moved it: old files name it by its old path.
_NUMPY_SCALAR = np.float64(0.0).__reduce__()[0]
_NUMPY_SCALAR_PATHS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")

# What published checkpoints hold beside tensors: the command line they were trained with, and a numpy accuracy.
_SAFE_GLOBALS: list[Callable | tuple[Callable, str]] = [
    argparse.Namespace,
    np.dtype,
    *((_NUMPY_SCALAR, path) for path in _NUMPY_SCALAR_PATHS),
    *(type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64")),
]

_MAX_LISTED = 3


class WeightsError(ValueError):
    """A weights file that cannot be used; the message says which, why, and what to do about it."""


@dataclass(frozen=True)
class Weights:
    """A state_dict and where it came from.

    ``metadata`` is what a safetensors header or a Lightning checkpoint's hyper-parameters say, else empty.
    """

    state_dict: dict[str, Tensor]
    metadata: dict[str, str]
    source: Path


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Read the weights in a file, on the CPU, whatever its format; the file's content decides, not its suffix.

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
    with path.open("rb") as file:
        head = file.read(9)
        file.seek(0)
        # A safetensors file is the length of its header in eight bytes, then the header, which is JSON.
        if path.suffix == ".safetensors" or head[8:] == b"{":
            return _read_safetensors(path)
        return read_checkpoint(file, source=path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a safetensors file without reading its tensors."""
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is not a complete safetensors file ({error})") from error


def _read_safetensors(path: Path) -> Weights:
    metadata = read_metadata(path)
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- not a mapping
    if not state_dict:
        raise WeightsError(f"{path} holds no tensors")
    return Weights(_plain_keys(state_dict), metadata, path)


def read_checkpoint(file: IO[bytes], source: str | Path) -> Weights:
    """Read the weights in an open ``torch.save``d file; ``source`` is what error messages call it.

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
        found = f"has the keys {_some(map(repr, content))}" if content else "is empty"
    raise WeightsError(f"{source} holds no state_dict: it {found}, with tensors neither there nor under 'model'")


def _is_state_dict(candidate: object) -> bool:
    return (
        isinstance(candidate, Mapping)
        and bool(candidate)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in candidate.items())
    )


def _plain_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``torch.compile``, which may have wrapped any submodule, and ``DataParallel``, which wraps all of it."""
    uncompiled = {key.replace("_orig_mod.", ""): value for key, value in state_dict.items()}
    return _strip(uncompiled, "module.")


def _student_of(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the model out of a Lightning module's state_dict, which may hold losses and a teacher as well."""
    taken = {key: value for key, value in state_dict.items() if key.startswith("student.")} or state_dict
    prefix = next((p for p in ("student.", "model.", "net.") if all(key.startswith(p) for key in taken)), "")
    return _strip(_strip(taken, prefix), "module.")


def _strip(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove a prefix from all keys, if all keys have it."""
    if not all(key.startswith(prefix) for key in state_dict):
        return state_dict
    return {key.removeprefix(prefix): value for key, value in state_dict.items()}


def load_weights(model: nn.Module, source: str | os.PathLike[str] | Weights, *, name: str | None = None) -> Weights:
    """Copy the weights of a file into a model, all of them or, on any mismatch, none; dtypes are converted.

    Args:
        model: the model to fill.
        source: a file, or what ``read_weights`` made of one.
        name: what error messages call the model; its class if not given.

    Raises:
        FileNotFoundError: as ``read_weights``.
        WeightsError: as ``read_weights``, or the weights are another model's.
    """
    weights = _without_auxiliary(source if isinstance(source, Weights) else read_weights(source), model)
    verify_weights(model, weights, name=name)
    unwrap(model).load_state_dict(weights.state_dict)
    return weights


def _without_auxiliary(weights: Weights, model: nn.Module) -> Weights:
    """Leaves out torchvision's auxiliary classifiers, which serve training alone, where the model has none."""
    wanted = unwrap(model).state_dict()
    auxiliary = ("aux1.", "aux2.", "AuxLogits.")
    kept = {key: v for key, v in weights.state_dict.items() if key in wanted or not key.startswith(auxiliary)}
    return replace(weights, state_dict=kept)


def verify_weights(model: nn.Module, weights: Weights, *, name: str | None = None) -> None:
    """Raise a ``WeightsError`` that explains the difference unless the weights have the model's keys and shapes."""
    model = unwrap(model)
    found = _shapes(weights.state_dict)
    # torch fills in BatchNorm's counters where they are absent, as they are from files made before torch 0.4.1.
    expected = {key: s for key, s in _shapes(model.state_dict()).items() if key in found or not _is_counter(key)}
    if expected == found:
        return
    target = f"the model {name or type(model).__name__}"
    if (widths := _classifier_widths(expected, found)) is not None:
        raise WeightsError(
            f"{weights.source} does not fit {target}: the file has {widths[1]} classes, the model {widths[0]}; "
            f"use weights trained on the same classes, or build the model with num_classes={widths[1]}"
        )
    shape_differs = [key for key in expected.keys() & found.keys() if expected[key] != found[key]]
    differences = {
        "missing from the file": [f"{key} {list(expected[key])}" for key in expected if key not in found],
        "not in the model": [f"{key} {list(found[key])}" for key in found if key not in expected],
        "of another shape": [
            f"{key} (file {list(found[key])}, model {list(expected[key])})" for key in expected if key in shape_differs
        ],
    }
    details = "; ".join(f"{len(items)} {what}: {_some(items)}" for what, items in differences.items() if items)
    candidates = identify(weights.state_dict)
    advice = (
        f"the file looks like {' or '.join(candidates)}: choose that model, or another file"
        if candidates
        else "the file matches no known model: check that it belongs to this architecture"
    )
    raise WeightsError(f"{weights.source} does not fit {target} ({details}); {advice}")


def identify(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Name the models whose keys and shapes are those of ``state_dict``, the number of classes aside.

    Candidates are the registered models and torchvision's ResNets.
    """
    found = {key: shape for key, shape in _shapes(state_dict).items() if not _is_counter(key)}
    return [
        name
        for name, expected in _signatures().items()
        if expected.keys() == found.keys() and all(map(_fits, expected.values(), map(found.get, expected)))
    ]


@cache
def _signatures() -> dict[str, dict[str, tuple[int | None, ...]]]:
    """Map every known model to its shapes, with None for the dimensions that depend on the number of classes."""
    signatures = {}
    with torch.device("meta"):
        for name in (*list_models(), *list_models("torchvision/resnet*")):
            few, many = (_shapes(create_model(name, num_classes=classes).state_dict()) for classes in (2, 3))
            signatures[name] = {
                key: tuple(a if a == b else None for a, b in zip(few[key], many[key], strict=True))
                for key in few
                if not _is_counter(key)
            }
    return signatures


def _fits(expected: Sequence[int | None], found: Sequence[int]) -> bool:
    return len(expected) == len(found) and all(a in (None, b) for a, b in zip(expected, found, strict=True))


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _classifier_widths(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> tuple[int, int] | None:
    """Return the (expected, found) number of outputs if one layer differs, and only in that."""
    if expected.keys() != found.keys():
        return None
    differing = [key for key in expected if expected[key] != found[key]]
    widths = {(expected[key][:1], found[key][:1]) for key in differing}
    same_layer = len({key.rpartition(".")[0] for key in differing}) == 1
    same_inputs = all(expected[key][1:] == found[key][1:] for key in differing)
    if not (same_layer and same_inputs and len(widths) == 1):
        return None
    ((model_width, file_width),) = widths
    return (*model_width, *file_width) if model_width and file_width else None


def _some(items: Iterable[str]) -> str:
    """Join the first few items, and say that there are more."""
    items = list(items)
    return ", ".join(items[:_MAX_LISTED]) + (", ..." if len(items) > _MAX_LISTED else "")


def save_weights(
    model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, object] | None = None
) -> None:
    """Write a model's weights as safetensors; the file appears whole or not at all.

    Args:
        model: the model, or its state_dict.
        path: the file to write; its folder is made if need be.
        metadata: what to note in the header. Strings are kept, other values are written as JSON.
    """
    path = Path(path).expanduser()
    state_dict = model.state_dict() if isinstance(model, nn.Module) else model
    # Cloned, because safetensors refuses tensors that share memory, such as tied weights.
    tensors = {
        key.replace("_orig_mod.", ""): value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in state_dict.items()
    }
    header = {key: value if isinstance(value, str) else _to_json(value) for key, value in (metadata or {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        # Not safetensors' save_file, whose files nobody but the owner can read, whatever the umask.
        temporary.write_bytes(safetensors.torch.save(tensors, metadata=header or None))
        os.replace(temporary, path)  # noqa: PTH105 -- atomic on every platform
    finally:
        temporary.unlink(missing_ok=True)


def _to_json(value: object) -> str:
    def convert(item: Any) -> object:
        return item.item() if hasattr(item, "item") else str(item)  # numpy and torch scalars; paths and the like

    return json.dumps(value, default=convert)
