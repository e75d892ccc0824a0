"""The index of a data set in shards: the location of each image, so that epochs can be planned before reading.

``index.json`` describes the data set and lists its shards; ``index.npz`` has, for each image of a split, the position
of its bytes in its shard, their checksum, its class and the name of its tar member. Both are beside the shards, or in
another folder with the shards' URLs.
"""

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rld_lightning.data import decode
from rld_lightning.data.shards.remote import join, local_path, read_bytes, write_bytes
from rld_lightning.data.shards.samples import MOST_BYTES, Samples, pack_samples, unpack_samples
from rld_lightning.data.shards.store import ShardStore
from rld_lightning.errors import malformed
from rld_lightning.limits import LARGEST_RESIZE, is_encodable, is_line, is_number, is_spread, is_three, is_whole
from rld_lightning.package_files import script_command

INDEX_FILE = "index.json"
SAMPLES_FILE = "index.npz"
FORMAT = "rld-lightning shards 1"
LOOK = ("image_size", "resize", "mean", "std")
_LOOKS = dict(
    zip(LOOK, [*[is_whole(1, LARGEST_RESIZE + 1)] * 2, is_three(is_number), is_three(is_spread)], strict=True)
)
_MOST_JSON = 1 << 26  # bytes; a shard takes some sixty
_LONGEST_PATH = 1 << 12  # bytes


class Shard(NamedTuple):
    """A tar file: its path or URL (absolute or relative to the index), its length and its number of images."""

    path: str
    bytes: int
    images: int


@dataclass(frozen=True)
class ShardIndex:
    """A data set in shards."""

    name: str  # short name of the data set
    class_names: list[str]  # the C names, in the order of the labels
    shards: dict[str, list[Shard]]  # the shards of each split
    samples: dict[str, Samples]  # the images of each split
    # `image_size`, `resize`, `mean` and `std` of the data set when it was packed; empty if it was only indexed
    look: dict[str, Any]

    def write(self, root: str, options: dict[str, Any] | None = None) -> None:
        """Writes both files into ``root``, a folder or URL; ``options`` are for the storage."""
        samples = pack_samples(self.samples)
        described = {
            "format": FORMAT,
            "name": self.name,
            "class_names": self.class_names,
            "look": self.look,
            "shards": {split: [shard._asdict() for shard in shards] for split, shards in self.shards.items()},
            "samples": {"file": SAMPLES_FILE, "sha256": hashlib.sha256(samples).hexdigest()},
        }
        write_bytes(join(root, SAMPLES_FILE), samples, options)
        # Last, so that shards with an index are complete.
        write_bytes(join(root, INDEX_FILE), (json.dumps(described, indent=1) + "\n").encode(), options)

    @classmethod
    def read(cls, root: str, options: dict[str, Any] | None = None) -> "ShardIndex":
        """Reads an index written by :meth:`write`.

        Raises:
            FileNotFoundError: there is no index.
            OSError: the storage cannot be reached.
            ValueError: the files are not an index, or do not belong together.
        """
        path = join(root, INDEX_FILE)
        again = f"make it again with {script_command('shards')}"
        try:
            content = read_bytes(path, _MOST_JSON, options)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path} does not exist: set data.root to a folder or an address of shards with their index, which "
                f"{script_command('shards')} makes from a folder of images or from shards."
            ) from error
        try:
            described = json.loads(content)
            if described["format"] != FORMAT:
                raise ValueError(f"its format is {described['format']!r} instead of {FORMAT!r}")
            shards = {split: [Shard(**shard) for shard in listed] for split, listed in described["shards"].items()}
            if (file := described["samples"]["file"]) != SAMPLES_FILE:  # never any other local file
                raise ValueError(f"its samples are in {file!r} instead of {SAMPLES_FILE}")
            _check_shards(root, shards)
            samples = read_bytes(join(root, SAMPLES_FILE), MOST_BYTES, options)
            if hashlib.sha256(samples).hexdigest() != described["samples"]["sha256"]:
                raise ValueError(f"{SAMPLES_FILE} beside it belongs to another index")
            found = unpack_samples(
                samples, {split: sum(shard.images for shard in own) for split, own in shards.items()}
            )
            if missing := {"train", "test"} - set(shards):
                raise ValueError(f"it has no {' and no '.join(sorted(missing))} split")
            index = cls(described["name"], described["class_names"], shards, found, described["look"])
            index._check()
            return index
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not an index of shards ({malformed(error)}): {again}.") from error

    def _check(self) -> None:
        """Raises ``ValueError`` for invalid values; the file is not trusted."""
        if not is_line(self.name) or "/" in self.name or self.name in (".", ".."):
            raise ValueError(f"{self.name!r} is not a valid name of a data set")
        if not isinstance(self.class_names, list) or not all(map(is_encodable, self.class_names)):
            raise ValueError("its class names are not text")
        if unknown := sorted(set(self.look) - set(LOOK)):
            raise ValueError(f"its look has {unknown[0]!r}, not one of {', '.join(LOOK)}")
        if wrong := [key for key, value in self.look.items() if value is not None and not _LOOKS[key](value)]:
            raise ValueError(
                f"its {wrong[0]} is not {'a number of pixels' if wrong[0] in LOOK[:2] else 'three numbers'}"
            )
        for split, shards in self.shards.items():
            samples = self.samples[split]
            if not len(samples.label):
                raise ValueError(f"its {split} split has no images")
            length = np.repeat([shard.bytes for shard in shards], [shard.images for shard in shards])
            if (samples.size > decode.MOST_BYTES).any():
                raise ValueError(f"it has {split} images that are larger than any")
            if (samples.offset < 0).any() or (samples.size < 0).any() or (samples.size > length - samples.offset).any():
                raise ValueError(f"it has {split} images outside their shards")
            if not ((samples.label >= 0) & (samples.label < len(self.class_names))).all():
                raise ValueError(f"it has {split} images of classes that it does not name")


def _check_shards(root: str, shards: dict[str, list[Shard]]) -> None:
    """Refuses shards without a path and sizes, and local shards in an index from a URL."""
    for shard in (shard for listed in shards.values() for shard in listed):
        if not _is_path(shard.path):
            raise ValueError("the paths of its shards are not texts")
        if not all(map(is_whole(0, 1 << 63), shard[1:])):
            raise ValueError(f"{shard.path} has {shard.bytes!r} bytes and {shard.images!r} images")
        if local_path(root) is None and local_path(join(root, shard.path)) is not None:
            raise ValueError(f"it is remote and names {shard.path}, a local file")


def _is_path(value: Any) -> bool:
    return is_encodable(value) and "\0" not in value and 0 < len(os.fsencode(value)) <= _LONGEST_PATH


class ShardList(NamedTuple):
    """Images in shards; see :class:`~rld_lightning.data.streaming.Images`.

    ``shard`` is the position of each image's shard in ``store``, int32 ``(N,)``.
    """

    class_names: list[str]
    samples: Samples
    shard: np.ndarray
    store: ShardStore

    @property
    def labels(self) -> Tensor:
        """Classes, int64 ``(N,)``."""
        return torch.from_numpy(self.samples.label)

    def take(self, index: Tensor) -> "ShardList":
        """Returns the images at ``index`` ``(M,)`` as a list."""
        at = index.numpy()
        return self._replace(samples=Samples(*(values[at] for values in self.samples)), shard=self.shard[at])

    def path(self, index: int) -> str:
        """Returns the URL of an image's shard and its member name."""
        return f"{self.store.addresses[self.shard[index]]}/{os.fsdecode(self.samples.member[index])}"

    def read(self, index: int) -> Tensor:
        """Reads the bytes of an image's file, uint8 ``(N,)``.

        Raises:
            BadImageError: the bytes are not those that were indexed.
            ShardError: its shard cannot be read.
        """
        samples = self.samples
        content = self.store.read(int(self.shard[index]), int(samples.offset[index]), int(samples.size[index]))
        if samples.crc32[index] not in (0, zlib.crc32(content.numpy().data)):
            raise decode.BadImageError("its shard, or the copy in the cache, has been damaged since it was indexed")
        return content
