"""Finds the weights in a checkpoint's content: their name, and the prefix of their keys.

Models are saved in many layouts: under ``"model"``, ``"state_dict"``, ``"net"``, beside an average of it, or inside a
module that also holds a loss or a teacher. If the network is known, its keys decide; otherwise the usual names do.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor

StateDict = Mapping[str, Tensor]

# Usual names of the model in files, the likeliest first: student before teacher, raw before averaged.
_NAMES = (
    *("state_dict", "model", "model_state_dict", "model_state", "net", "network", "student", "weights", "params"),
    *("module", "backbone", "teacher", "state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema"),
)
_WRAPPERS = ("student.", "model.", "net.")


@dataclass(frozen=True)
class Part:
    """A state_dict in a file."""

    path: str  # the keys that lead to it, joined by dots; empty if it is the file's whole content
    state_dict: dict[str, Tensor]  # tensors by the file's keys, without the prefixes of `torch.compile`


def find_parts(content: object) -> list[Part]:
    """Returns all state_dicts in a checkpoint, the likeliest first.

    Args:
        content: the loaded content. Searched are itself, its values, and the values inside those with a usual name.
    """
    if _is_state_dict(content):
        return [Part("", _uncompiled(content))]
    if not isinstance(content, Mapping):
        return []
    parts = []
    names = [name for name in (*_NAMES, *content) if isinstance(name, str) and name in content]
    for name in dict.fromkeys(names):
        value = content[name]
        if _is_state_dict(value):
            parts.append(Part(name, _uncompiled(value)))
        elif name in _NAMES and isinstance(value, Mapping):
            inner = (key for key in _NAMES if _is_state_dict(value.get(key)))
            parts += [Part(f"{name}.{key}", _uncompiled(value[key])) for key in inner]
    return parts


def wanted_parts(parts: list[Part], wanted: str) -> list[Part]:
    """Selects a part of a file.

    Args:
        wanted: the path of a part, or a prefix of its keys.

    Returns:
        a list of one part, without the prefix; empty if there is no such part.
    """
    named = [part for part in parts if part.path == wanted]
    prefix = f"{wanted}."
    inside = (
        Part(f"{part.path}.{wanted}".removeprefix("."), _under(part.state_dict, prefix))
        for part in parts
        if any(key.startswith(prefix) for key in part.state_dict)
    )
    return (named or list(inside))[:1]


def usual_keys(part: Part) -> dict[str, Tensor]:
    """Returns the state_dict without the key prefixes of the usual wrappers.

    These are ``DataParallel``, averaged models, and modules that hold a loss or a teacher beside the student.
    """
    plain = _unparallel(part.state_dict)
    plain = {key: value for key, value in plain.items() if key.startswith("student.")} or plain
    for prefix in _WRAPPERS:
        if plain and all(key.startswith(prefix) for key in plain):
            return _unparallel(_under(plain, prefix))
    return plain


def fitting(
    parts: list[Part], shapes: Mapping[str, tuple[int, ...]], spare: tuple[str, ...]
) -> Iterator[tuple[str, Part]]:
    """Yields the places in a file that hold exactly a network's weights, the likeliest first.

    Args:
        shapes: of the network's state_dict; its counters may be absent in the file.
        spare: prefixes of extra keys that the file may have.

    Yields:
        the path and prefix of the place, and the part with the network's keys.
    """
    counters = {key for key in shapes if key.endswith("num_batches_tracked")}
    needed = shapes.keys() - counters
    anchor = next((key for key in shapes if key in needed), "")
    for part in parts:
        ends = [key for key in part.state_dict if key == anchor or key.endswith(f".{anchor}")]
        for prefix in sorted({key.removesuffix(anchor) for key in ends}, key=_likelihood):
            own = _under(part.state_dict, prefix)
            more = {key for key in own.keys() - shapes.keys() if not key.startswith(spare)}
            if more or needed - own.keys() or any(tuple(own[key].shape) != shapes[key] for key in own if key in shapes):
                continue
            yield ".".join(filter(None, (part.path, prefix.rstrip(".")))), Part(part.path, own)


def _likelihood(prefix: str) -> tuple[bool, bool, int]:
    return ("ema" in prefix or "teacher" in prefix, "student" not in prefix and prefix != "", len(prefix))


def _is_state_dict(candidate: object) -> TypeGuard[StateDict]:
    return (
        isinstance(candidate, Mapping)
        and bool(candidate)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in candidate.items())
    )


def _uncompiled(state_dict: StateDict) -> dict[str, Tensor]:
    """Removes the prefixes of ``torch.compile``, which may have wrapped any submodule."""
    return {key.replace("_orig_mod.", ""): value for key, value in state_dict.items()}


def _under(state_dict: StateDict, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def _unparallel(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefix of ``DataParallel``, which may have wrapped all but the counter of an averaged model."""
    inner = _under(state_dict, "module.")
    return inner if inner and len(state_dict) - len(inner) == ("n_averaged" in state_dict) else state_dict
