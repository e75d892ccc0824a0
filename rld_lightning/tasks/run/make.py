"""Creates data, trainer and device from the configuration, and chooses a batch size for device and data."""

from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:  # Lightning takes seconds to import, and plans are read without it
    from lightning.pytorch import Trainer

    from rld_lightning.data.base import ImageDataModule

AUTO = "auto"
_STEPS = 16  # minimum number of steps per epoch, roughly, so that small data sets get enough updates
_LEAST, _MOST_CPU, _MOST_SMALL_GPU, _MOST = 8, 32, 64, 128
_LARGE_GPU = 20e9  # bytes; networks with about 30 M parameters train on 128 images of 224 x 224 in 16 GB


def make_data(settings: DictConfig) -> "ImageDataModule":
    """Creates the data module that ``data`` describes, with batch size 1 if it is still to be chosen."""
    if settings.batch_size != AUTO:
        return instantiate(settings)
    return instantiate(settings, batch_size=1)


def suitable_batch(images: int, device: torch.device, processes: int = 1) -> int:
    """Returns a power of two (times the number of processes if that is not one) with 16 steps per epoch, within bounds.

    Bounds per process: 8 to 32 on a CPU, to 64 on a GPU with less than 20 GB, to 128 on larger ones.

    Args:
        images: number of training images, over all processes.
        processes: number of processes that share the batch.
    """
    most = _MOST_CPU
    if device.type == "cuda":
        most = _MOST if torch.cuda.get_device_properties(device).total_memory >= _LARGE_GPU else _MOST_SMALL_GPU
    elif device.type != "cpu":
        most = _MOST_SMALL_GPU
    share = max(images // (_STEPS * processes), 1)
    return processes * min(max(1 << (share.bit_length() - 1), _LEAST), most)


def make_trainer(settings: DictConfig, **others: Any) -> "Trainer":
    """Creates a trainer; null options get Lightning's defaults."""
    values: Any = OmegaConf.to_container(settings, resolve=True)
    stated = {key: value for key, value in (values | others).items() if value is not None}
    trainer: Trainer = instantiate(stated)
    return trainer


def device_of(option: str) -> torch.device:
    """Returns the device of ``device=``; ``auto`` is the NVIDIA GPU if there is one, else the CPU.

    Raises:
        ValueError: the device does not exist.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = ("cuda" if there["cuda"] else "cpu") if option == "auto" else option
    if not there.get(name, True):
        raise ValueError(f"device={option} is not there; choose device=cpu.")
    return torch.device(name)
