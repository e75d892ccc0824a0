"""Data sets, one per file: each is a LightningDataModule that yields :class:`Batch`, independent of models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rld_lightning.data.base import Batch, ImageDataModule
    from rld_lightning.data.cifar100 import CIFAR100DataModule
    from rld_lightning.data.digits import DigitsDataModule
    from rld_lightning.data.imagefolder import ImageFolderDataModule
    from rld_lightning.data.imagenet import ImageNetDataModule
    from rld_lightning.data.in_memory import InMemoryDataModule, InMemoryLoader
    from rld_lightning.data.shards.data_module import ShardsDataModule

# Imported on first use, so that decoding an image does not import Lightning.
_HOMES = {
    "Batch": "base",
    "CIFAR100DataModule": "cifar100",
    "DigitsDataModule": "digits",
    "ImageDataModule": "base",
    "ImageFolderDataModule": "imagefolder",
    "ImageNetDataModule": "imagenet",
    "InMemoryDataModule": "in_memory",
    "InMemoryLoader": "in_memory",
    "ShardsDataModule": "shards.data_module",
}

__all__ = [
    "Batch",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "InMemoryDataModule",
    "InMemoryLoader",
    "ShardsDataModule",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
