"""A trainer, and where there is none a device, as the configuration says."""

from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def make_trainer(settings: DictConfig, **others: Any) -> "Trainer":
    """Makes a trainer; what is null has Lightning's default."""
    values: Any = OmegaConf.to_container(settings, resolve=True)
    stated = {key: value for key, value in (values | others).items() if value is not None}
    trainer: Trainer = instantiate(stated)
    return trainer


def device_of(option: str) -> torch.device:
    """The device of ``device=``; ``auto`` is the GPU where there is one.

    Raises:
        ValueError: it is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = ("cuda" if there["cuda"] else "cpu") if option == "auto" else option
    if not there.get(name, True):
        raise ValueError(f"device={option} is not there; choose device=cpu.")
    return torch.device(name)
