"""Finds the images, classes and splits in a folder of class folders."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from rld_lightning.data.decode import read_file
from rld_lightning.data.stratified import stratified_split

_MOST_QUOTED = 10
# Picture formats of cameras, phones and browsers that are not read.
_OTHER_PICTURES = (
    *(".gif", ".heic", ".heif", ".avif", ".jfif", ".jp2", ".jxl", ".tga", ".psd"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
)
TRAIN_FOLDER = "train"
VAL_FOLDERS = ("val", "valid", "validation")
TEST_FOLDER = "test"
# Other common names of these, in any case, with or without `_set` and the like: `Training`, `train_set`, `TEST`.
_SPLIT_NAMES = {
    TRAIN_FOLDER: (TRAIN_FOLDER, "training"),
    VAL_FOLDERS[0]: (*VAL_FOLDERS, "validate", "dev", "eval", "evaluation"),
    TEST_FOLDER: (TEST_FOLDER, "testing"),
}
_SPLIT_NAME_ENDS = ("set", "split", "data", "dataset", "images", "folder")
# A flat folder's test split does not depend on the seed of a run, so that results are comparable.
TEST_SEED = 0


class ImageList(NamedTuple):
    """The files of a split.

    ``paths`` is a NumPy array of bytes rather than a list of ``str``: worker processes share its memory, while
    reference counting would copy a million strings into each worker. ``labels`` is int64 ``(N,)``.
    """

    class_names: list[str]
    paths: np.ndarray
    labels: Tensor

    def take(self, index: Tensor) -> "ImageList":
        """Returns the files at ``index`` ``(M,)`` as a list."""
        return ImageList(self.class_names, self.paths[index.numpy()], self.labels[index])

    def path(self, index: int) -> str:
        """Returns the path of an image."""
        return os.fsdecode(self.paths[index])

    def read(self, index: int) -> Tensor:
        """Reads the bytes of an image's file, uint8 ``(N,)``; see :func:`~rld_lightning.data.decode.read_file`."""
        return read_file(self.path(index))


def list_images(folder: Path, left_out: Counter[str] | None = None) -> ImageList:
    """Lists the images in the class folders of ``folder``, sorted by class and name, without hidden files.

    Args:
        folder: the parent of the class folders.
        left_out: is filled with the number of pictures in unsupported formats, by suffix.
    """
    class_names = _folders_in(folder)
    if len(class_names) < 2:
        raise ValueError(
            f"{folder} has {len(class_names)} class folders, at least two are needed: "
            "place the images of each class in a folder named after it."
        )
    _check_no_splits(folder, class_names)
    left_out = Counter() if left_out is None else left_out

    def is_image(path: str) -> bool:
        name = path.lower()
        if name.endswith(_OTHER_PICTURES):
            left_out[Path(name).suffix] += 1
        return name.endswith(IMG_EXTENSIONS)

    files = ((path, number) for number, name in enumerate(class_names) for path in _files_below(folder / name))
    samples = [(path, number) for path, number in files if is_image(path)]
    labels = torch.tensor([number for _, number in samples], dtype=torch.int64)
    counts = torch.bincount(labels, minlength=len(class_names))
    if empty := [name for name, count in zip(class_names, counts.tolist(), strict=True) if not count]:
        raise ValueError(
            f"{folder} has class folders without an image, {_quote(empty)}: add images "
            f"({', '.join(IMG_EXTENSIONS)}) or remove these folders."
        )
    return ImageList(class_names, np.array([os.fsencode(path) for path, _ in samples]), labels)


def _files_below(folder: Path) -> Iterator[str]:
    """Yields the files below a class folder in torchvision's order; follows links, but visits each folder only once.

    Two links of a folder to itself would double its files up to forty times. Hidden files are no images of the data
    set: macOS writes a ``._photo.jpg`` beside each into its archives, and notebooks keep copies in
    ``.ipynb_checkpoints``.
    """
    folders, visited = list[tuple[str, list[str]]](), set[tuple[int, int]]()
    for path, inner, files in os.walk(folder, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        status = Path(path).stat()
        if (folder_id := (status.st_dev, status.st_ino)) in visited:
            inner.clear()
            continue
        visited.add(folder_id)
        folders.append((path, files))
    for path, files in sorted(folders):
        yield from (f"{path}/{name}" for name in sorted(files) if not name.startswith("."))


def find_splits(root: Path, test_fraction: float, left_out: Counter[str] | None = None) -> dict[str, ImageList]:
    """Lists the images of each split.

    Args:
        root: a folder of splits, or a flat folder of classes.
        test_fraction: share of a flat folder's images for the test split.
        left_out: as for :func:`list_images`.

    Returns:
        the splits ``"train"``, ``"test"`` and, if the folder has both, ``"val"``.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: set data.root to a folder of class folders of images.")
    folders = _folders_in(root)
    train, val, test = (_find_split(root, folders, split) for split in (TRAIN_FOLDER, VAL_FOLDERS[0], TEST_FOLDER))
    if val and test and not _folders_in(root / test):
        test = None  # as in ImageNet, whose `test` holds images without classes
    if train and (tested := test or val):
        lists = {name: list_images(root / name, left_out) for name in (train, val, test) if name}
        for name, images in lists.items():
            _check_classes(lists[train].class_names, images.class_names, root / name, train)
        splits = {"train": lists[train], "test": lists[tested]}
        return splits | ({"val": lists[val]} if val and test else {})
    if train and _folders_in(root / train):
        raise ValueError(
            f"{root} has {train}/ but none of {', '.join((*VAL_FOLDERS, TEST_FOLDER))} beside it: add one, or "
            f"set data.root to {root / train} to hold out data.test_fraction of its images."
        )
    if folders and set(folders) <= {val, test, *VAL_FOLDERS}:
        raise ValueError(
            f"{root} has {folders[0]}/ but no {TRAIN_FOLDER}/ beside it: add the class folders of the training images."
        )
    images = list_images(root, left_out)
    kept, held_out = stratified_split(images.labels, test_fraction, TEST_SEED, "test_fraction", images.class_names)
    return {"train": images.take(kept), "test": images.take(held_out)}


def _find_split(root: Path, folders: list[str], split: str) -> str | None:
    """Finds the folder of a split, by a documented name, or by another common one if it contains folders."""
    documented = VAL_FOLDERS if split in VAL_FOLDERS else (split,)
    if found := next((name for name in documented if name in folders), None):
        return found
    others = [name for name in folders if _is_split_name(name, split) and _folders_in(root / name)]
    if len(others) > 1:
        raise ValueError(f"{root} has {_quote(others)}, which may all be the {split} split: rename one to {split}/.")
    return others[0] if others else None


def _is_split_name(name: str, split: str) -> bool:
    plain = re.sub(r"[\W_]", "", name.casefold())
    return plain in {usual + end for usual in _SPLIT_NAMES[split] for end in ("", *_SPLIT_NAME_ENDS)}


def _check_no_splits(folder: Path, class_names: list[str]) -> None:
    """Refuses folders that look like splits with unusual names: all contain the same class folders."""
    inner = []
    for name in class_names:
        with os.scandir(folder / name) as entries:
            names = set()
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    names.add(entry.name)
                elif entry.name.lower().endswith(IMG_EXTENSIONS):
                    return
            inner.append(names)
    if len(common := sorted(set.intersection(*inner))) > 1:
        raise ValueError(
            f"{folder} has no images in {_quote(class_names)} but the same folders in each, {_quote(common)}: if these "
            f"are the classes, name the folders of splits {TRAIN_FOLDER}/ and {VAL_FOLDERS[0]}/ or {TEST_FOLDER}/; if "
            "not, place the images of each class directly in its folder."
        )


def _check_classes(expected: list[str], found: list[str], folder: Path, train: str) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"{folder} has other classes than {train}/: missing {_quote(missing)}, unknown {_quote(unknown)}; "
            "give both the same class folders."
        )


def _folders_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _quote(names: list[str]) -> str:
    """Quotes at most :data:`_MOST_QUOTED` names for an error message."""
    more = f" and {len(names) - _MOST_QUOTED} more" if len(names) > _MOST_QUOTED else ""
    return (", ".join(map(repr, names[:_MOST_QUOTED])) or "none") + more
