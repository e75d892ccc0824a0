"""Data sets, one a file: each is a LightningDataModule that yields :class:`Batch` and knows nothing of models."""

from rld_lightning.data.base import Batch, ImageDataModule
from rld_lightning.data.cifar100 import CIFAR100DataModule
from rld_lightning.data.digits import DigitsDataModule
from rld_lightning.data.imagefolder import ImageFolderDataModule
from rld_lightning.data.imagenet import ImageNetDataModule
from rld_lightning.data.in_memory import InMemoryDataModule, InMemoryLoader
from rld_lightning.data.shards.module import ShardsDataModule

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
