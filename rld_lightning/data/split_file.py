"""Split files record the split of each image, so that a growing folder keeps its splits."""

import csv
import os
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import torch

from rld_lightning.atomic_files import write_whole
from rld_lightning.data.image_list import ImageList
from rld_lightning.data.streaming import Images

_SPLITS = ("train", "val", "test")
_LARGEST = 1 << 30  # bytes


class WrittenSplit(NamedTuple):
    """Images split as in a split file."""

    # `"train"`, `"test"` and, if the file has one, `"val"`, each in the order of the file
    splits: dict[str, ImageList]
    missing: int  # number of images in the file that no longer exist
    new: int  # number of images that are not in the file; they are in no split


def write_split(path: Path, root: Path, splits: Mapping[str, Images]) -> None:
    """Writes a line ``split,image`` for each image, with its path relative to ``root``."""
    writer = csv.writer(text := StringIO(), lineterminator="\n")
    writer.writerow(("split", "image"))
    for name, images in splits.items():
        writer.writerows((name, os.path.relpath(images.path(i), root)) for i in range(len(images.labels)))
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))


def read_split(path: Path, root: Path, images: ImageList) -> WrittenSplit:
    """Splits images as in a split file. The file is not trusted: its paths are only compared, never opened.

    Args:
        path: the file.
        root: the folder that its paths are relative to.
        images: all images of all splits.

    Raises:
        ValueError: it is not a split file, or a split would be empty.
    """
    way_out = "move it away, or have the folder shared out anew with data.split_file=null"
    if not path.is_file() or path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} is not a split file; {way_out}.")
    place = {os.path.relpath(images.path(i), root): i for i in range(len(images.labels))}
    try:
        rows = list(csv.reader(StringIO(path.read_bytes().decode("utf-8", "surrogateescape"))))
    except csv.Error:  # such as an overlong cell
        rows = []
    if rows[:1] != [["split", "image"]] or any(len(row) != 2 or row[0] not in _SPLITS for row in rows[1:]):
        raise ValueError(f"{path} has other lines than split,image with the splits {', '.join(_SPLITS)}; {way_out}.")
    split_of = {image: split for split, image in rows[1:]}
    found: dict[str, list[int]] = {name: [] for name in _SPLITS if name in split_of.values()}
    for image, split in split_of.items():
        if image in place:
            found[split].append(place[image])
    for name in ("train", "test", *found):
        if not found.get(name):
            raise ValueError(f"{path} has no {name} image that is in {root}; {way_out}.")
    known = sum(map(len, found.values()))
    splits = {name: images.take(torch.tensor(positions)) for name, positions in found.items()}
    return WrittenSplit(splits, missing=len(split_of) - known, new=len(place) - known)
