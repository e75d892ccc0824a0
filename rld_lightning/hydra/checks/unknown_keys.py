"""Finds unknown keys and suggests similar known ones."""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rld_lightning.hydra.checks.schema import VALUES
from rld_lightning.hydra.options import CONF

ABSENT = "<absent>"
# Groups whose keys the package reads by name; arguments of classes are checked by their signatures.
_NAMED = ("", "recipe", "model", "model.student", "model.teacher", "paths")
_GROUPS = {key[:end] for key in VALUES for end in (*(dot.start() for dot in re.finditer(r"\.", key)), None)}
_GROUPS |= {"hydra", "loss"}


def unknown_keys(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields a sentence per unknown key that resembles a known one (``+recipe.epoch=3``, or in a user's own file)."""
    added = []
    for group in _NAMED:
        node = find(values, group) if group else values
        names = map(str, node) if isinstance(node, Mapping) else ()
        added += [key for key in (f"{group}.{name}".lstrip(".") for name in names) if key not in _GROUPS]
    references = _references(values) if added else set()
    shipped = _shipped_keys() if added else ()
    # Without keys of other scripts and of loggers that are not chosen.
    known = [key for key in VALUES if find(values, key.rpartition(".")[0] if "." in key else key) is not ABSENT]
    for key in added:
        if key not in shipped and not any(
            f"{other}.".startswith((f"{key}.", f"{key.rpartition('.')[2]}.")) for other in references
        ):
            sentence, meant = unknown_key(key, known)
            if meant:
                yield sentence


@cache
def _shipped_keys() -> frozenset[str]:
    """Returns the full keys in the package's own files, except experiments."""
    groups = ("", "model", "recipe", "paths")
    return frozenset(key for group in groups for file in (CONF / group).glob("*.yaml") for key in _keys_in(file, group))


def _keys_in(file: Path, group: str) -> Iterator[str]:
    text = file.read_text()
    values = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    return full_keys(values, f"{group}." if group and not text.startswith("# @package _global_") else "")


def full_keys(values: Any, prefix: str = "") -> Iterator[str]:
    """Yields the full keys of nested mappings."""
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from full_keys(value, f"{prefix}{name}.")


def unknown_key(key: str, known: Iterable[str]) -> tuple[str, list[str]]:
    """Returns a sentence about an unknown key, and the keys that may have been meant."""
    if choices := _options_with(key):
        return f"{key} is not known without {' or '.join(choices[:3])}; add one to the command.", choices
    known = list(known)
    group, _, name = key.rpartition(".")
    names = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == group}
    meant = [names[near] for near in get_close_matches(name, names, n=2, cutoff=0.7)] if group else []
    if group and names:
        # A user who names an existing group hardly means a key that is merely similar in another.
        within = [other for other in known if other.startswith(f"{group.partition('.')[0]}.")]
        meant = meant or _near_leaves(name, within, 1.0)
        if not meant:
            options = ", ".join(sorted(other for other in names if not other.startswith("_")))
            meant = _near_leaves(name, known, 1.0)
            elsewhere = f" Or did you mean {' or '.join(meant)}?" if meant else ""
            return f"{key} is not known; {group} has {options}.{elsewhere}", meant
    meant = meant or _near_leaves(name, known, 0.8) or get_close_matches(key, known, n=2, cutoff=0.8)
    if meant:
        return f"{key} is not known. Did you mean {' or '.join(meant)}?", meant
    own = [other for other in known if "." not in other]
    if not group and 0 < len(known) <= 2 * len(own):  # a script with few keys and no config groups
        return f"{key} is not known; there are {', '.join(own)}.", []
    return f"{key} is not known; `--cfg all` prints all keys.", []


def _options_with(key: str) -> list[str]:
    """Returns the group options that define a key: ``logger=wandb`` for ``logger.wandb.project``."""
    group = key.partition(".")[0]
    files = (CONF / group).glob("*.yaml") if re.fullmatch(r"\w+", group) else ()
    return sorted((f"{group}={file.stem}" for file in files if key in _keys_in(file, group)), key=len)


def _near_leaves(name: str, known: Iterable[str], cutoff: float) -> list[str]:
    """Returns full keys whose last part resembles ``name``, except those of ``model.tuned``."""
    leaves: dict[str, str] = {}
    for key in known:  # the first is the most common meaning of a name
        if not key.startswith("model.tuned."):
            leaves.setdefault(key.rpartition(".")[2], key)
    return [leaves[near] for near in get_close_matches(name, leaves, n=2, cutoff=cutoff)]


def _references(values: Any) -> set[str]:
    """Returns the keys that a configuration's interpolations refer to, without leading dots."""
    if isinstance(values, Mapping):
        return {name for value in values.values() for name in _references(value)}
    if isinstance(values, list):
        return {name for value in values for name in _references(value)}
    return {found.lstrip(".") for found in re.findall(r"\$\{(?:[\w.]+:)?([\w.]+)", str(values))}


def find(values: Any, key: str) -> Any:
    """Returns the unresolved value of a full key; :data:`ABSENT` if there is none."""
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return ABSENT
        values = values[name]
    return values
