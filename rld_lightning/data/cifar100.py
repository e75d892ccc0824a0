"""CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in 100 classes."""

import hashlib
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from rld_lightning.data.in_memory import InMemoryDataModule
from rld_lightning.download import fetch, file_md5

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
ARCHIVE = "cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
FOLDER = "cifar-100-python"
FILE_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
# In the order of the labels.
FINE_LABELS = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


class CIFAR100DataModule(InMemoryDataModule):
    """CIFAR-100 in torchvision's file layout, ``root/cifar-100-python/{train,test,meta}``.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The files are pickles, so each
    is only read if its MD5 is the published one. Mean and standard deviation are those of the published distillation
    code (mdistiller, after RepDistiller), so that its teachers get the normalisation of their training.

    Args:
        root: folder of the data set.
        download: whether to download missing files.
        url: URL of ``cifar-100-python.tar.gz``, if not its home page's; must be the same file.
        options: see :class:`~rld_lightning.data.in_memory.InMemoryDataModule`.
    """

    is_benchmark = True

    name = "cifar100"
    num_classes = 100
    class_names = FINE_LABELS.split()
    image_shape = (3, 32, 32)
    mean = (0.5071, 0.4867, 0.4408)
    std = (0.2675, 0.2565, 0.2761)

    def __init__(
        self, root: str | Path = "data", *, download: bool = True, url: str | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.root = Path(root)
        self.download = download
        self.url = url or URL

    def prepare_data(self) -> None:
        """Downloads and unpacks the data set if a file is missing; one process at a time."""
        if not self._missing():
            return
        if not self.download:
            raise FileNotFoundError(f"CIFAR-100 is missing and data.download=false: {self._how_to_place()}")
        if self.root.exists() and not self.root.is_dir():
            raise NotADirectoryError(f"{self.root} is not a folder: set data.root to one, for CIFAR-100 to lie in.")
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / f".{FOLDER}.lock"):
            if not self._missing():  # another process has unpacked it
                return
            archive = self.root / ARCHIVE
            if archive.is_file():
                _check_md5(archive, file_md5(archive), ARCHIVE_MD5)
            else:
                fetch(self.url, archive, ARCHIVE_MD5)
            self._unpack(archive)

    def read_split(self, train: bool) -> tuple[Tensor, Tensor]:
        """Checks the MD5 of a split and reads it: images uint8 ``(N, 32, 32, 3)`` and fine labels int64 ``(N,)``."""
        split = "train" if train else "test"
        path = self.root / FOLDER / split
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: call prepare_data(), or {self._how_to_place()}")
        # Checksum and unpickle the same bytes, as the file may change in between.
        content = path.read_bytes()
        _check_md5(path, hashlib.md5(content, usedforsecurity=False).hexdigest(), FILE_MD5[split])
        entry = pickle.loads(content, encoding="latin1")
        images = torch.from_numpy(entry["data"]).view(-1, 3, 32, 32).permute(0, 2, 3, 1)
        return images.contiguous(), torch.tensor(entry["fine_labels"])

    def _missing(self) -> list[str]:
        return [name for name in FILE_MD5 if not (self.root / FOLDER / name).is_file()]

    def _how_to_place(self) -> str:
        return (
            f"get {self.url}, place it at {self.root / ARCHIVE} and call prepare_data(), or unpack it in {self.root}."
        )

    def _unpack(self, archive: Path) -> None:
        """Extracts the three files from the archive, each atomically."""
        folder = self.root / FOLDER
        folder.mkdir(exist_ok=True)
        with tarfile.open(archive) as tar:
            for name, md5 in FILE_MD5.items():
                part = folder / f"{name}.part"
                part.unlink(missing_ok=True)  # in a copied folder it may be a symbolic link
                source = tar.extractfile(f"{FOLDER}/{name}")
                assert source is not None  # a regular file in the archive with this checksum
                with source, part.open("wb") as target:
                    shutil.copyfileobj(source, target)
                _check_md5(part, file_md5(part), md5)
                part.replace(folder / name)


def _check_md5(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"{path} is damaged (MD5 {found} instead of {expected}): delete it and run again.")
