"""Data before their batch is known, and a batch that suits device and data."""

from typing import TYPE_CHECKING

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

if TYPE_CHECKING:  # Lightning takes seconds, and plans are read without it
    from rld_lightning.data.base import ImageDataModule

AUTO = "auto"
_STEPS = 16  # an epoch has at least about as many, so that a small folder gets its steps
_LEAST, _MOST_CPU, _MOST_SMALL_GPU, _MOST = 8, 32, 64, 128
_LARGE_GPU = 20e9  # bytes; networks of some 30 M parameters train on 128 images of 224 x 224 in 16 GB


def make_data(settings: DictConfig) -> "ImageDataModule":
    """The data that ``data`` describes; where their batch is still to be chosen, it is 1 for now."""
    if settings.batch_size != AUTO:
        return instantiate(settings)
    return instantiate(settings, batch_size=1)


def suitable_batch(images: int, device: torch.device, processes: int = 1) -> int:
    """A power of two, times the number of processes where that is none: what an epoch has 16 steps with, within bounds.

    These are 8, and 32 on a CPU, 64 on a GPU of less than 20 GB, 128 on others: of each process.

    Args:
        images: to train on, in all processes.
        processes: that share the batch.
    """
    most = _MOST_CPU
    if device.type == "cuda":
        most = _MOST if torch.cuda.get_device_properties(device).total_memory >= _LARGE_GPU else _MOST_SMALL_GPU
    elif device.type != "cpu":
        most = _MOST_SMALL_GPU
    share = max(images // (_STEPS * processes), 1)
    return processes * min(max(1 << (share.bit_length() - 1), _LEAST), most)
