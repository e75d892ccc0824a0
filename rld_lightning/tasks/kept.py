"""The data of a sweep's trials: read once by the process that they are forked from, whose memory they share."""

import json
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rld_lightning import warm
from rld_lightning.data.base import ImageDataModule
from rld_lightning.data.in_memory import InMemoryDataModule

_kept: dict[str, InMemoryDataModule] = {}


def share_data(settings: DictConfig) -> None:
    """Has the process that trials are forked from read their data, where it is small.

    Args:
        settings: ``data``; trials with other settings read for themselves.
    """
    warm.prepare(f"{__name__}:keep", _as_text(settings))


def keep(settings: str) -> None:
    """Reads data and keeps them for those that are forked from here.

    Args:
        settings: ``data`` as JSON.
    """
    data = instantiate(OmegaConf.create(json.loads(settings)))
    if isinstance(data, InMemoryDataModule):
        data.setup()
        _kept[settings] = data


def make_data(settings: DictConfig) -> ImageDataModule:
    """The data module that ``data`` describes; what was read before it was forked it need not read.

    Args:
        settings: ``data``.
    """
    data: ImageDataModule = instantiate(settings)
    kept = _kept.get(_as_text(settings)) if _kept else None
    if kept is not None and isinstance(data, InMemoryDataModule):
        data.take_over(kept)
    return data


def _as_text(settings: DictConfig) -> str:
    values: Any = OmegaConf.to_container(settings, resolve=True)
    if not values.get("val_fraction") and values.get("subset") == 1:
        values["seed"] = 0  # which chooses nothing
    return json.dumps(values, sort_keys=True)
