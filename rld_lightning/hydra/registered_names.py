"""The registered networks and losses, without importing PyTorch.

Importing takes seconds, too long for help, completion and messages about typos. So the names and options are cached in
the user's cache folder, and read again if a source file of a network or a loss has changed.
"""

import hashlib
import json
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rld_lightning.atomic_files import write_whole

_PACKAGE = Path(__file__).resolve().parents[1]


class Known(NamedTuple):
    """The registered networks and losses."""

    models: list[str]  # names of the networks, in natural order
    # Options of the losses by name, as Hydra instantiates them, in alphabetical order
    losses: dict[str, dict[str, Any]]
    methods: dict[str, str]  # name of each loss's method
    on_features: list[str]  # losses that use features
    families: dict[str, list[str]]  # networks by the docstring of the file that defines them


def known() -> Known:
    """Returns what is registered; from the cache only if no registry is imported, so that nothing can be added yet."""
    if {"rld_lightning.losses.registry", "rld_lightning.models.registry"} & sys.modules.keys():
        return _registered()
    return _cached()


@cache
def _cached() -> Known:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rld-lightning"
    file = cache / f"known-{hashlib.sha256(str(_PACKAGE).encode()).hexdigest()[:16]}.json"
    state = _state()
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        saved = json.loads(file.read_text())
        if saved.pop("state") == state:
            return Known(**saved)
    registered = _registered()
    with suppress(OSError, TypeError):  # works without a cache
        write_whole(file, json.dumps({**registered._asdict(), "state": state}).encode())
    return registered


def _registered() -> Known:
    from rld_lightning.losses import list_losses, loss_class, loss_options
    from rld_lightning.losses.features import FeatureLoss
    from rld_lightning.models import list_models
    from rld_lightning.models.registry import REGISTRY

    families: dict[str, list[str]] = {}
    for name in list_models():
        words = sys.modules[REGISTRY[name].__module__].__doc__ or "Others"
        families.setdefault(words.partition("\n")[0].partition(":")[0].rstrip("."), []).append(name)
    names = list_losses()
    return Known(
        models=list_models(),
        losses={name: loss_options(name) for name in names},
        methods={name: loss_class(name).method for name in names},
        on_features=[name for name in names if issubclass(loss_class(name), FeatureLoss)],
        families=families,
    )


def _state() -> str:
    """Returns a hash that changes with any file of networks and losses, and with this one."""
    files = [Path(__file__), *(path for room in ("losses", "models") for path in (_PACKAGE / room).rglob("*.py"))]
    stats = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(files)]
    return hashlib.sha256(repr((sys.version_info, stats)).encode()).hexdigest()
