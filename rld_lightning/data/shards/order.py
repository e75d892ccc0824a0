"""In which order the images of shards are trained on, so that few shards are needed at a time."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rld_lightning.data.sampler import EpochSampler
from rld_lightning.data.shards.index import ShardList
from rld_lightning.data.streaming import Encoded, Key, KeySampler, Sample, StreamedImages

# Behind those in use, so many more are fetched ahead.
SHARDS_AHEAD = 8


class ShardShuffle:
    """Permutes the images of shards within a window that moves through permuted shards.

    The shards are permuted and their images laid out one shard after the other. This row is cut into ``streams`` equal
    parts, in each of which an image moves back by up to ``mixed / streams`` shards, at random. Batches take an equal
    share from each stream, always at the same places. As a process takes neighbouring places of each global batch, it
    reads from its part of the streams alone, and with as many machines as streams or fewer nearly every shard is
    fetched by one of them only; still the global batches are the same however many there are.

    At both ends of an epoch a batch is drawn from fewer shards than in between, from one a stream at first. So shards
    should be packed in random order, as those of scripts/shards.py and the published ones are.

    Args:
        shard: the shard of each image, int ``(N,)``, ascending.
        batch_size: the global batch.
        streams: number of streams.
        mixed: how many shards the images of a batch come from, over all streams.
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
    """The keys of a batch, and the shards to fetch meanwhile."""

    keys: list[Key]
    ahead: list[int]


class ShardKeySampler(KeySampler):
    """Yields with each batch the shards that this process will begin to read ``SHARDS_AHEAD`` shards later.

    Args:
        sampler: which images this process takes.
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
    """Images whose shards are fetched ahead of them; see :class:`~rld_lightning.data.streaming.StreamedImages`."""

    images: ShardList

    def __getitems__(self, request: Request) -> list[Sample | Encoded]:
        """The images of a batch."""
        for shard in request.ahead:
            self.images.store.fetch(shard)
        return [self[key] for key in request.keys]

    def key_sampler(self, sampler: EpochSampler) -> ShardKeySampler:
        """Makes what asks for the batches of a sampler's epoch and says which shards come next."""
        return ShardKeySampler(sampler, self.images.shard)
