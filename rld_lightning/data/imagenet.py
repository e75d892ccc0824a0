"""ImageNet-1k: 1,281,167 training and 50,000 validation images in 1,000 classes."""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock
from torchvision.datasets.imagenet import (
    ARCHIVE_META,
    META_FILE,
    load_meta_file,
    parse_devkit_archive,
    parse_train_archive,
    parse_val_archive,
)
from torchvision.models import ResNet18_Weights

from rld_lightning.data.image_list import ImageList
from rld_lightning.data.imagefolder import ImageFolderDataModule
from rld_lightning.limits import is_line

SPLITS = ("train", "val")
_WNID = re.compile(r"n\d+")
# SHA-256 of the 1,000 sorted WordNet ids, one per line: the classes of torchvision's and timm's models.
WNIDS_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


class ImageNetDataModule(ImageFolderDataModule):
    """ImageNet (ILSVRC 2012), as folders or as the official archives.

    ``root/{train,val}/<WordNet id>/*``; ``val`` is the test split. A missing folder is unpacked, with torchvision's
    functions, from the archives of :class:`torchvision.datasets.ImageNet`: for ``train``
    ``root/ILSVRC2012_img_train.tar``, for ``val`` ``root/ILSVRC2012_img_val.tar`` and
    ``root/ILSVRC2012_devkit_t12.tar.gz``. Any subset of the classes works too, such as ImageNet-100's folders.

    Source: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015, arXiv 1409.0575.

    Args:
        root: the folder.
        name: name of the data set.
        options: see :class:`~rld_lightning.data.imagefolder.ImageFolderDataModule`.
    """

    is_benchmark = True

    def __init__(self, root: str | Path = "data/imagenet", *, name: str = "imagenet", **options: Any) -> None:
        super().__init__(root, name=name, **options)

    def find_splits(self) -> dict[str, ImageList]:
        """Lists the files of ``"train"`` and ``"test"``, after unpacking them if necessary."""
        self.prepare_data()
        return super().find_splits()

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """English names of the classes, in the order of their WordNet ids.

        For the 1,000 classes, the names in torchvision's models; for other choices of classes, the names in the devkit
        if it has been unpacked, else the folder names.
        """
        wnids = super().class_names
        if hashlib.sha256("\n".join(wnids).encode()).hexdigest() == WNIDS_SHA256:
            return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
        if not (self.root / META_FILE).exists():
            return wnids
        names = self._read_meta()[0]
        # Two classes may share their first name, such as crane, the bird and the machine.
        return [f"{names[wnid][0]} ({wnid})" if wnid in names else wnid for wnid in wnids]

    def prepare_data(self) -> None:
        """Unpacks missing splits; one process at a time. An interrupted unpacking starts over."""
        folders = [self.root / split for split in SPLITS if (self.root / split).is_dir()]
        for folder in folders:
            if not any(entry.is_dir() for entry in folder.iterdir()):
                raise ValueError(
                    f"{folder} has no class folders: sort its images into folders named after their WordNet ids, or "
                    f"move it away and have it unpacked. {self._how_to_get()}"
                )
        if len(folders) == len(SPLITS):
            return
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is not a folder: set data.root to ImageNet's. {self._how_to_get()}")
        self._missing()  # before there is a lock file in a folder that is not ImageNet's
        with FileLock(self.root / ".imagenet.lock"):
            for split in self._missing():
                self._check_space(split)
                self._unpack(split)

    def _missing(self) -> list[str]:
        """Returns the splits to unpack, after checking that all their archives exist."""
        missing = [split for split in SPLITS if not (self.root / split).is_dir()]
        archives = [*missing, *(["devkit"] if "val" in missing and not (self.root / META_FILE).exists() else [])]
        # Check all of them before the first hour of unpacking.
        if absent := [self._archive(name).name for name in archives if not self._archive(name).is_file()]:
            raise FileNotFoundError(
                f"{self.root} has no {'/ and no '.join(missing)}/, nor {' and '.join(absent)} to unpack. "
                f"{self._how_to_get()}"
            )
        return missing

    def _unpack(self, split: str) -> None:
        # A hidden folder, which is not listed as a class, until the split is complete.
        part = self.root / f".{split}.part"
        if part.is_symlink():  # in a copied folder; its target must not be changed
            part.unlink()
        shutil.rmtree(part, ignore_errors=True)
        if split == "train":
            with self._whole(split):
                parse_train_archive(self.root, folder=part.name)
        else:
            with self._whole("devkit"):
                self._unpack_devkit()
            wnids = self._read_meta()[1]
            with self._whole(split):
                parse_val_archive(self.root, wnids=wnids, folder=part.name)
        part.replace(self.root / split)

    def _unpack_devkit(self) -> None:
        if (self.root / META_FILE).exists():
            return
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            parse_devkit_archive(folder, file=str(self._archive("devkit").resolve()))
            (Path(folder) / META_FILE).replace(self.root / META_FILE)

    def _read_meta(self) -> tuple[dict[str, tuple[str, ...]], list[str]]:
        """Reads the names of each WordNet id, and the WordNet id of each validation image."""
        try:
            names, wnids = load_meta_file(self.root)
            usual = all(isinstance(words, tuple) and is_line(words[0]) for words in names.values())
            if not usual or not all(map(_WNID.fullmatch, [*names, *wnids])):  # ids become names of folders
                raise ValueError
            return names, wnids
        except Exception as error:  # unpicklers, and values of other types, raise almost anything
            raise ValueError(
                f"{self.root / META_FILE}, which torchvision makes from {self._archive('devkit').name}, is damaged: "
                "delete it and run again."
            ) from error

    def _check_space(self, split: str) -> None:
        archive, free = self._archive(split), shutil.disk_usage(self.root).free
        if (needed := archive.stat().st_size) > free:
            raise ValueError(
                f"unpacking {archive} takes {needed / 1e9:.0f} GB, and {self.root} has {free / 1e9:.0f} GB free."
            )

    @contextmanager
    def _whole(self, name: str) -> Iterator[None]:
        """Names the archive whose MD5 is wrong; torchvision would name a temporary folder."""
        try:
            yield
        except RuntimeError as error:
            raise ValueError(
                f"{self._archive(name)} is damaged, its MD5 is not the published one: delete it. {self._how_to_get()}"
            ) from error

    def _archive(self, name: str) -> Path:
        return self.root / ARCHIVE_META[name][0]

    def _how_to_get(self) -> str:
        archives = ", ".join(name for name, _ in ARCHIVE_META.values())
        return (
            f"Get {archives} at https://image-net.org, which asks for an account, and place them in {self.root}, or "
            "set data.root to a folder that has train/ and val/ with class folders."
        )
