"""Folders of class folders, such as ImageNet: too large for the device, so streamed by worker processes."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rld_lightning.data.base import ImageDataModule
from rld_lightning.data.image_list import TEST_FOLDER, ImageList, find_splits
from rld_lightning.data.split_file import read_split, write_split
from rld_lightning.data.streaming import Images
from rld_lightning.data.streaming_module import StreamingDataModule
from rld_lightning.distributed import is_rank_zero


class ImageFolderDataModule(StreamingDataModule):
    """A folder of class folders of images.

    Three layouts are supported. ``root/train`` with one of ``root/{val,valid,validation,test}``: the latter is
    the test split, like ImageNet's ``val``. ``root/train``, one of ``root/{val,valid,validation}`` and
    ``root/test``, all with class folders: validation and test split are different, and nothing is held out of
    ``train``. ``root/<class>/...``: a fixed, stratified ``test_fraction`` of the images is the test split. Splits
    may also be named ``Train``, ``training``, ``train_set`` and the like; folders that look like splits with other
    names are refused.

    Args:
        root: the folder.
        test_fraction: share of the images in the test split, if the folder has no splits.
        split_file: file that records random splits. An existing file is followed, even if images were added or removed
            since.
        name: name of the data set; by default that of the folder.
        options: see :class:`~rld_lightning.data.streaming_module.StreamingDataModule`.
    """

    split_options = ImageDataModule.split_options | {"test_fraction": "test_fraction"}

    def __init__(
        self,
        root: str | Path,
        *,
        test_fraction: float = 0.2,
        split_file: str | Path | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        self.root = Path(root)
        super().__init__(name=self.root.resolve().name if name is None else name, **options)
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction={test_fraction} must be in (0, 1), 0.2 for a fifth of the images.")
        self.test_fraction = test_fraction
        self.split_file = None if split_file is None else Path(split_file)
        self._since = ""
        self._left_out: Counter[str] = Counter()  # pictures in unsupported formats, by suffix

    def find_splits(self) -> dict[str, ImageList]:
        """Lists the files of ``"train"``, ``"test"`` and, if the folder has its own, ``"val"``."""
        self._left_out.clear()
        return find_splits(self.root, self.test_fraction, self._left_out)

    def _held_out(self) -> dict[str, Images]:
        if self.split_file is None:
            return super()._held_out()
        if self.split_file.exists():
            return self._from_split_file(self.split_file)
        splits = super()._held_out()
        if (self.val_fraction > 0 or self._is_flat(splits)) and is_rank_zero():
            write_split(self.split_file, self.root, splits)
        return splits

    def _is_flat(self, splits: Mapping[str, Images]) -> bool:
        """Whether the folder contains classes rather than splits."""
        return (self.root / splits["train"].class_names[0]).is_dir()

    def _from_split_file(self, file: Path) -> dict[str, Images]:
        train, *others = self.find_splits().values()
        paths = np.array([path for images in (train, *others) for path in images.paths])
        labels = torch.cat([images.labels for images in (train, *others)])
        written = read_split(file, self.root, ImageList(train.class_names, paths, labels))
        if self.val_fraction > 0 and "val" not in written.splits:
            raise ValueError(f"{file} has no validation images; set data.val_fraction=0.")
        counts = ((written.missing, "of them are missing"), (written.new, "new ones are ignored"))
        self._since = "".join(f", {count:,} {what}" for count, what in counts if count)
        return dict(written.splits)

    def describe(self) -> str:
        """One line for the console, with the test split, changes since the split file, and unsupported pictures."""
        splits, tested = self.splits, ""
        if self.val_split == "val" and not self.is_benchmark and not self._is_flat(splits):
            folder = Path(os.path.relpath(splits["test"].path(0), self.root)).parts[0]
            tested = "" if folder == TEST_FOLDER else f"; {folder}/ is the test split"
        since = f"; split as in {self.split_file}{self._since}" if self._since else ""
        left_out = ""
        if self._left_out:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self._left_out.most_common())
            left_out = f"; caution: pictures in unsupported formats are skipped ({kinds})"
        return f"{super().describe()}{tested}{since}{left_out}"
