"""Creates the trainer, or without one the device, from the configuration."""

from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def make_trainer(settings: DictConfig, **others: Any) -> "Trainer":
    """Creates a trainer; null options get Lightning's defaults."""
    values: Any = OmegaConf.to_container(settings, resolve=True)
    stated = {key: value for key, value in (values | others).items() if value is not None}
    trainer: Trainer = instantiate(stated)
    return trainer


def device_of(option: str) -> torch.device:
    """Returns the device of ``device=``; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: the device does not exist.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = ("cuda" if there["cuda"] else "cpu") if option == "auto" else option
    if not there.get(name, True):
        raise ValueError(f"device={option} is not there; choose device=cpu.")
    return torch.device(name)
