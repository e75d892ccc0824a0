"""Data sets in tar shards, read from local disks or object storage: for what does not fit one machine.

The shards are WebDataset's: plain tar files that any tool reads and that ImageNet is published in, while litdata's
chunks are its own format, its distributed epochs drop images, and it needs boto3, obstore and tifffile. Of webdataset
we take the writer and the conventions; its reading pipeline hands out whole shards, so that processes end an epoch at
different steps and none can resume within one, and version 1.0 has dropped its indexed reader, which is why an index of
every image's place lets our own sampler plan exact epochs.
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
from rld_lightning.data.shards.store import CachedShards, LocalShards, ShardError, ShardStore, cached_bytes
from rld_lightning.data.streaming_module import StreamingDataModule


class ShardsDataModule(StreamingDataModule):
    """Images in tar shards with an index, which ``scripts/shards.py`` makes.

    Epochs are as exact as any other data set's: each training image once, evaluation unpadded, the same global batches
    whatever the number of processes and workers, and resumed in their middle. Shards on a local disk are read in place.
    Those of a store (``s3://``, ``gs://``, ``http://``, ...) are fetched a little before they are needed into a cache
    that all processes of a machine share.

    Args:
        root: where ``index.json`` is: a folder or an address.
        mixed_shards: how many shards the images of a training batch are drawn from at a time; ``None`` for all, which
            only local disks or a cache for all of them can take.
        streams: in how many parts an epoch is read side by side: on as many machines or fewer, each shard is fetched by
            one of them (nearly) only. The order of training images depends on it and on ``mixed_shards``.
        cache: the folder for shards of a store, on a disk of the machine's own.
        cache_gb: what they may take there, in GB; 0 has each image fetched on its own, which suits a small ``subset``.
        storage_options: options of the store for fsspec, such as ``endpoint_url`` for S3. Keys and passwords belong
            into the environment instead, since a run keeps its configuration.
        image_size: side of the square images that the model sees; by default as when they were packed.
        resize: shorter side that evaluation images are resized to; by default likewise, if ``image_size`` is.
        mean: mean of each channel; by default as when they were packed.
        std: standard deviation of each channel, likewise.
        name: name of the data set, by default the one that was packed.
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
                f"mixed_shards={mixed_shards} and streams={streams} do not fit: at least one stream, and at least one "
                "shard for each."
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

    def _adopt_look(self) -> None:
        packed = self.index.look
        if "image_size" in self._chosen:
            packed = {key: value for key, value in packed.items() if key != "resize"}
        self._set_look(**(packed | self._chosen))

    def normalize_with(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Has images normalised otherwise from now on, whatever they were packed with."""
        self._chosen |= {"mean": mean, "std": std}
        super().normalize_with(mean, std)

    def find_splits(self) -> dict[str, ShardList]:
        """The images that the index lists."""
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
        """Lists the images, and sees that the shards and the cache are as they should be."""
        self._adopt_look()
        super().setup(stage)
        for images in self.splits.values():
            images.store.check()
        if isinstance(self.splits["train"].store, CachedShards):
            self._check_cache()

    def train_sampler(self) -> EpochSampler:
        """Makes the sampler of this process's share of the training split."""
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
        """Refuses a cache that would throw away shards that are still being read."""
        sizes = sorted((shard.bytes for shards in self.index.shards.values() for shard in shards), reverse=True)
        # In each stream the window begins and ends within a shard.
        window = len(sizes) if self.mixed_shards is None else self.mixed_shards + self.streams + SHARDS_AHEAD
        needed = sum(sizes[:window]) / 1e9
        if needed > self.cache_gb:
            raise ShardError(
                f"cache_gb={self.cache_gb:g} is too little: mixed_shards={self.mixed_shards} and those ahead of them "
                f"take {needed:.3g} GB. Raise cache_gb, mix fewer shards, or pack smaller ones."
            )
        self.cache.mkdir(parents=True, exist_ok=True)
        free = (shutil.disk_usage(self.cache).free + cached_bytes(self.cache)) / 1e9
        if (wanted := min(self.cache_gb, sum(sizes) / 1e9)) > free:
            raise ShardError(
                f"cache_gb={self.cache_gb:g} would take {wanted:.3g} GB, and the disk of {self.cache} has {free:.3g} "
                "GB for it: lower cache_gb or choose another folder with cache."
            )
