"""The order of training images in shards, so that few shards are needed at a time."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rld_lightning.data.sampler import EpochSampler
from rld_lightning.data.shards.index import ShardList
from rld_lightning.data.streaming import Encoded, Key, KeySampler, Sample, StreamedImages

# Number of shards to download ahead of those in use.
SHARDS_AHEAD = 8


class ShardShuffle:
    """Shuffles images within a window that moves through permuted shards.

    The shards are permuted and their images concatenated. This sequence is divided into ``streams`` equal parts, in
    each of which every image moves back by a random distance of up to ``mixed / streams`` shards. A batch has an equal
    share from each stream, at fixed positions. Since a process uses adjacent positions of each global batch, it reads
    only some of the streams, and with at most as many machines as streams, nearly every shard is downloaded by one of
    them only. The global batches do not depend on the number of machines.

    At both ends of an epoch a batch comes from fewer shards than in between, at first from one per stream. So shards
    should be packed in random order, like those of scripts/shards.py and published ones.

    Args:
        shard: the shard of each image, int ``(N,)``, ascending.
        batch_size: the global batch.
        streams: number of streams.
        mixed: number of shards that the images of a batch come from, over all streams.
    """

    def __init__(self, shard: np.ndarray, batch_size: int, streams: int, mixed: int) -> None:
        self.shard = torch.from_numpy(shard).long()
        self.batch_size = batch_size
        self.streams = min(streams, batch_size)
        self.window = mixed / streams * len(shard) / len(self.shard.unique())

    def __call__(self, size: int, generator: torch.Generator) -> Tensor:
        """Draws the order of an epoch, int64 ``(N,)``."""
        row = torch.randperm(int(self.shard[-1]) + 1, generator=generator)[self.shard].argsort(stable=True)
        delay = self.window * torch.rand(size, generator=generator, dtype=torch.float64)
        batches, width = size // self.batch_size, self.batch_size
        order = torch.empty(size, dtype=torch.int64)
        full = order[: batches * width].view(batches, width)
        edges = [width * stream // self.streams for stream in range(self.streams + 1)]
        for first, last in pairwise(edges):
            part = slice(batches * first, batches * last)
            full[:, first:last] = _delayed(row[part], delay[part]).view(batches, last - first)
        order[batches * width :] = _delayed(row[batches * width :], delay[batches * width :])
        return order


def _delayed(row: Tensor, delay: Tensor) -> Tensor:
    return row[(torch.arange(len(row)) + delay).argsort()]


class Request(NamedTuple):
    """The keys of a batch, and the shards to download ahead."""

    keys: list[Key]
    ahead: list[int]


class ShardKeySampler(KeySampler):
    """Yields with each batch the shards that this process will start to read ``SHARDS_AHEAD`` shards later.

    Args:
        sampler: selects the images of this process.
        shard: the shard of each image, int ``(N,)``.
    """

    def __init__(self, sampler: EpochSampler, shard: np.ndarray) -> None:
        super().__init__(sampler)
        self.shard = shard

    def __iter__(self) -> Iterator[Request]:
        keys, steps = self.draw(), self.sampler.steps[self.start :]
        shards, first = np.unique(self.shard[keys[steps[0].start :, 0].numpy()], return_index=True)
        begun, first = shards[first.argsort()].tolist(), np.sort(first) + steps[0].start
        announced = 0
        for step in steps:
            ahead = int(np.searchsorted(first, step.stop)) + SHARDS_AHEAD
            yield Request(keys[step].tolist(), begun[announced:ahead])
            announced = ahead


class ShardedImages(StreamedImages):
    """Images whose shards are downloaded ahead; see :class:`~rld_lightning.data.streaming.StreamedImages`."""

    images: ShardList

    def __getitems__(self, request: Request) -> list[Sample | Encoded]:
        """Loads the images of a batch, and starts the downloads ahead."""
        for shard in request.ahead:
            self.images.store.fetch(shard)
        return [self[key] for key in request.keys]

    def key_sampler(self, sampler: EpochSampler) -> ShardKeySampler:
        """Creates the batch sampler for a sampler's epochs, which also yields the next shards."""
        return ShardKeySampler(sampler, self.images.shard)
