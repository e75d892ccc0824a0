"""Any folder of class folders, such as ImageNet: too big for the device, hence streamed by worker processes."""

from pathlib import Path
from typing import Any

from rld_lightning.data.base import ImageDataModule
from rld_lightning.data.image_list import ImageList, find_splits
from rld_lightning.data.streaming_module import StreamingDataModule


class ImageFolderDataModule(StreamingDataModule):
    """A folder of class folders of images.

    Three layouts are understood. ``root/train`` beside one of ``root/{val,valid,validation,test}``: the latter is the
    test split, as ImageNet's ``val`` is. ``root/train``, one of ``root/{val,valid,validation}`` and ``root/test``, all
    with class folders: validation and test split are different. ``root/<class>/...``: a fixed, stratified
    ``test_fraction`` of the images is the test split. Splits may also be called ``Train``, ``training``, ``train_set``
    and the like; folders that look like splits by names of their own are refused.

    Args:
        root: the folder.
        test_fraction: share of the images in the test split, if the folder does not say.
        name: name of the data set, by default that of the folder.
        options: see :class:`~rld_lightning.data.streaming_module.StreamingDataModule`.
    """

    split_options = ImageDataModule.split_options | {"test_fraction": "test_fraction"}

    def __init__(
        self, root: str | Path, *, test_fraction: float = 0.2, name: str | None = None, **options: Any
    ) -> None:
        self.root = Path(root)
        super().__init__(name=self.root.resolve().name if name is None else name, **options)
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction={test_fraction} must be in (0, 1), 0.2 for a fifth of the images.")
        self.test_fraction = test_fraction

    def find_splits(self) -> dict[str, ImageList]:
        """Lists the files of ``"train"``, ``"test"`` and, where the folder has one of its own, ``"val"``."""
        return find_splits(self.root, self.test_fraction)
