"""Data sets in tar shards on local disks or object storage, for data that does not fit one machine.

The shards are WebDataset's: plain tar files that any tool reads and in which ImageNet is published. litdata's chunks
have their own format, its distributed epochs drop images, and it needs boto3, obstore and tifffile. We use webdataset's
writer and conventions, but not its reading pipeline: it assigns whole shards, so that processes end an epoch at
different steps and cannot resume within one, and version 1.0 removed its indexed reader. Instead, an index of every
image's location lets our own sampler plan exact epochs.
"""

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rld_lightning.data.sampler import EpochSampler
from rld_lightning.data.shards.index import INDEX_FILE, Shard, ShardIndex, ShardList
from rld_lightning.data.shards.order import SHARDS_AHEAD, ShardedImages, ShardShuffle
from rld_lightning.data.shards.remote import join, local_path
from rld_lightning.data.shards.store import (
    CachedShards,
    LocalShards,
    ShardError,
    ShardStore,
    cached_bytes,
    remove_old_failures,
)
from rld_lightning.data.streaming_module import StreamingDataModule


class ShardsDataModule(StreamingDataModule):
    """Images in tar shards with an index, written by ``scripts/shards.py``.

    Epochs are as exact as any other data set's: each training image once, evaluation without padding, the same global
    batches for any number of processes and workers, and resumable within an epoch. Shards on a local disk are read in
    place. Those in object storage (``s3://``, ``gs://``, ``http://``, ...) are downloaded ahead of use into a cache
    that all processes of a machine share.

    Args:
        root: folder or URL of ``index.json``.
        mixed_shards: number of shards that the images of a training batch come from; ``None`` for all, which needs
            local disks or a cache for all of them.
        streams: number of parts of an epoch that are read in parallel: on at most as many machines, (nearly) every
            shard is downloaded by only one of them. The order of training images depends on it and on ``mixed_shards``.
        cache: folder for downloaded shards, on a local disk.
        cache_gb: size limit of the cache in GB; with 0 each image is downloaded separately, for a small ``subset``.
        storage_options: options of the storage for fsspec, such as ``endpoint_url`` for S3. Put keys and passwords into
            the environment instead, since a run stores its configuration.
        image_size: height and width of the model's input; by default the value when packed.
        resize: length of an evaluation image's shorter side; by default the value when packed, unless ``image_size`` is
            given.
        mean: mean of each channel; by default the value when packed.
        std: standard deviation of each channel; by default the value when packed.
        name: name of the data set; by default the name when packed.
        options: see :class:`~rld_lightning.data.streaming_module.StreamingDataModule`.
    """

    _dataset = ShardedImages
    _kind = "data set"
    splits: Mapping[str, ShardList]

    def __init__(
        self,
        root: str | Path,
        *,
        mixed_shards: int | None = 32,
        streams: int = 8,
        cache: str | Path = "data/shard_cache",
        cache_gb: float = 50.0,
        storage_options: dict[str, Any] | None = None,
        image_size: int | None = None,
        resize: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        if streams < 1 or (mixed_shards is not None and mixed_shards < streams):
            raise ValueError(
                f"data.mixed_shards={mixed_shards} and data.streams={streams} do not fit: at least one stream, and at "
                "least one shard for each."
            )
        if cache_gb < 0:
            raise ValueError(f"cache_gb={cache_gb} must be 0 or more; 0 fetches each image on its own.")
        look = {"image_size": image_size, "resize": resize, "mean": mean, "std": std}
        self._chosen: dict[str, Any] = {key: value for key, value in look.items() if value is not None}
        super().__init__(name=name or "", **options)
        self.root = str(root)
        self.mixed_shards = mixed_shards
        self.streams = streams
        self.cache = Path(cache)
        self.cache_gb = cache_gb
        self.storage_options = storage_options

    @cached_property
    def index(self) -> ShardIndex:
        """The index, read when first needed."""
        return ShardIndex.read(self.root, self.storage_options)

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self._name or self.index.name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name

    def normalize_with(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Changes the normalisation of images, whatever they were packed with."""
        self._chosen |= {"mean": mean, "std": std}
        super().normalize_with(mean, std)

    def find_splits(self) -> dict[str, ShardList]:
        """Returns the images listed in the index."""
        return {
            split: ShardList(
                self.index.class_names,
                samples,
                np.repeat(
                    np.arange(len(self.index.shards[split]), dtype=np.int32),
                    [shard.images for shard in self.index.shards[split]],
                ),
                self._store(self.index.shards[split]),
            )
            for split, samples in self.index.samples.items()
        }

    def setup(self, stage: str | None = None) -> None:
        """Lists the images, and checks the shards and the cache."""
        look = {key: value for key, value in self.index.look.items() if value is not None} | self._chosen
        if "image_size" in self._chosen and "resize" not in self._chosen:
            look.pop("resize", None)
        self._set_look(**look)
        super().setup(stage)
        for images in self.splits.values():
            images.store.check()
        if isinstance(self.splits["train"].store, CachedShards):
            self._check_cache()

    def train_sampler(self) -> EpochSampler:
        """Creates the sampler of this process's share of the training split."""
        sampler = super().train_sampler()
        if self.mixed_shards is not None:
            shard = self.splits["train"].shard
            sampler.permute = ShardShuffle(shard, self.batch_size, self.streams, self.mixed_shards)
        return sampler

    def _store(self, shards: list[Shard]) -> ShardStore:
        addresses, sizes = [join(self.root, shard.path) for shard in shards], [shard.bytes for shard in shards]
        local = [local_path(address) is not None for address in addresses]
        if all(local):
            return LocalShards(addresses, sizes)
        if any(local):
            raise ValueError(f"{join(self.root, INDEX_FILE)} names shards on local disks and in a store: use one kind.")
        if not self.cache_gb:
            return ShardStore(addresses, sizes, self.storage_options)
        return CachedShards(addresses, sizes, self.cache, round(1e9 * self.cache_gb), self.storage_options)

    def _check_cache(self) -> None:
        """Refuses a cache so small that it would evict shards still being read."""
        sizes = sorted((shard.bytes for shards in self.index.shards.values() for shard in shards), reverse=True)
        # In each stream the window may begin and end within a shard.
        window = len(sizes) if self.mixed_shards is None else self.mixed_shards + self.streams + SHARDS_AHEAD
        needed = sum(sizes[:window]) / 1e9
        if needed > self.cache_gb:
            raise ShardError(
                f"data.cache_gb={self.cache_gb:g} is too little: data.mixed_shards={self.mixed_shards} and those ahead "
                f"of them take {needed:.3g} GB. Raise data.cache_gb, mix fewer shards, or pack smaller ones."
            )
        self.cache.mkdir(parents=True, exist_ok=True)
        remove_old_failures(self.cache)
        free = (shutil.disk_usage(self.cache).free + cached_bytes(self.cache)) / 1e9
        if (wanted := min(self.cache_gb, sum(sizes) / 1e9)) > free:
            raise ShardError(
                f"data.cache_gb={self.cache_gb:g} would take {wanted:.3g} GB, and the disk of {self.cache} has "
                f"{free:.3g} GB for it: lower data.cache_gb or choose another folder with data.cache."
            )
