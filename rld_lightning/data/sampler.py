"""Assigns samples to processes and steps, as a function of the seed and the epoch only.

Everything random is drawn for the whole epoch and all processes, and belongs to a *position* in the epoch; each process
then uses its share of the positions. So global batches do not depend on the number of processes, a resumed run gets the
batches that it would have had, and evaluation never changes the random state of training.
"""

import hashlib
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Creates the CPU generator for everything random in an epoch.

    The pair is hashed: with ``seed + epoch``, epoch 1 of seed 0 would repeat epoch 0 of seed 1. PyTorch's CPU generator
    (MT19937) uses only four bytes of a seed.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _permute(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator)


def share_of_batch(batch_size: int, world_size: int) -> int:
    """Returns the number of samples of a global batch for each process.

    Raises:
        ValueError: the batch cannot be divided equally.
    """
    share, remainder = divmod(batch_size, world_size)
    if remainder or share < 1:
        raise ValueError(
            f"data.batch_size={batch_size} is the global batch and cannot be shared by {world_size} processes: "
            f"choose a positive multiple of {world_size}."
        )
    return share


class EpochSampler(SequentialSampler):
    """The positions of an epoch that one process visits, step by step.

    (It derives from PyTorch's ``SequentialSampler`` in name only, because Lightning would replace any other sampler for
    ``overfit_batches``.)

    Args:
        size: N, the number of samples in the split.
        batches: for each step, the positions in [0, N) of this process, int64 ``(B,)``.
        seed: seed of everything drawn for the epoch.
        shuffle: whether the samples are permuted before they are assigned to positions.

    Attributes:
        positions: the positions of all steps, concatenated, int64 ``(M,)``.
        steps: for each step, its slice of ``positions``.
        epoch: the epoch of the next iteration.
        permute: returns an order ``(N,)`` int64, given N and a generator. Uniform, unless a data set replaces it.
        repeat: whether each epoch has the order of epoch 0, to overfit on the same few batches; everything else is
            drawn anew in each.
    """

    def __init__(self, size: int, batches: list[Tensor], *, seed: int = 0, shuffle: bool = False) -> None:
        self.size = size
        self.positions = torch.cat(batches)
        stops = accumulate(len(batch) for batch in batches)
        self.steps = [slice(stop - len(batch), stop) for batch, stop in zip(batches, stops, strict=True)]
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.permute: Callable[[int, torch.Generator], Tensor] = _permute
        self.repeat = False

    @classmethod
    def for_training(
        cls,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> "EpochSampler":
        """Divides an epoch into global batches of ``batch_size``, and each of them equally between the ranks.

        The last, smaller batch is divided equally too, because distributed training averages the gradients of the
        processes with equal weight. If it is not divisible, it is filled with samples from the start of the epoch;
        also if a process would get a single image, for which batch norm has no variance, unless all batches are so.
        """
        share = share_of_batch(batch_size, world_size)
        full, rest = divmod(size, batch_size)
        batches = list(torch.arange(full * batch_size).view(full, world_size, share)[:, rank])
        if rest and not drop_last:
            share = max(-(-rest // world_size), min(share, 2))
            batches.append((full * batch_size + rank * share + torch.arange(share)) % size)
        if not batches:
            raise ValueError(
                f"data.drop_last=true leaves no training batch: {size} images are fewer than "
                f"data.batch_size={batch_size}. Lower it, or set data.drop_last=false."
            )
        return cls(size, batches, seed=seed, shuffle=shuffle)

    @classmethod
    def for_evaluation(cls, size: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> "EpochSampler":
        """Assigns every sample exactly once, in order, with the same number of steps for every process.

        The global batches are as equal as possible, without a small one at the end (10,000 images at 512 are 20 batches
        of 500). So each of them has a sample for every process, and no process ends while others wait in a collective.
        """
        if batch_size < 1:
            raise ValueError(f"eval_batch_size={batch_size} must be at least 1.")
        if size < world_size:
            raise ValueError(
                f"{size} images cannot be evaluated by {world_size} processes: use at most {size} processes."
            )
        batches = torch.arange(size).tensor_split(min(-(-size // batch_size), size // world_size))
        return cls(size, [batch.tensor_split(world_size)[rank] for batch in batches])

    def __len__(self) -> int:
        return len(self.steps)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration; Lightning calls this before each epoch."""
        self.epoch = epoch

    def draw_order(self) -> tuple[Tensor, torch.Generator]:
        """Draws the sample at each position of the epoch.

        Returns:
            the order ``(N,)`` int64, and the generator for the augmentation of the N positions.
        """
        generator = epoch_generator(self.seed, self.epoch)
        if not self.shuffle:
            return torch.arange(self.size), generator
        return self.permute(self.size, epoch_generator(self.seed, 0) if self.repeat else generator), generator
