"""Shares the data of a sweep's trials: read once by the fork server, whose memory the trials share."""

import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rld_lightning import forked_processes
from rld_lightning.data.base import ImageDataModule
from rld_lightning.data.in_memory import InMemoryDataModule
from rld_lightning.tasks.run.make import make_data

_loaded: dict[str, InMemoryDataModule] = {}


def share_data(settings: DictConfig) -> None:
    """Makes the fork server read the trials' data, if they are small.

    Args:
        settings: ``data``; trials with other settings read their data themselves.
    """
    forked_processes.run_in_server(f"{__name__}:load", _as_text(settings))


def load(settings: str) -> None:
    """Reads data and keeps them for processes forked from this one.

    Args:
        settings: ``data`` as JSON.
    """
    data = make_data(OmegaConf.create(json.loads(settings)))
    if isinstance(data, InMemoryDataModule):
        data.setup()
        _loaded[settings] = data


def reuse_cached_data(data: ImageDataModule, settings: DictConfig) -> None:
    """Reuses data that were read before this process was forked."""
    loaded = _loaded.get(_as_text(settings)) if _loaded else None
    if loaded is not None and isinstance(data, InMemoryDataModule):
        data.take_over(loaded)


def _as_text(settings: DictConfig) -> str:
    values: Any = OmegaConf.to_container(settings, resolve=True)
    if not values.get("val_fraction") and values.get("subset") == 1:
        values["seed"] = 0  # has no effect on reading
    return json.dumps(values, sort_keys=True)
