"""Which samples a process sees in which step, as a function of the seed, the epoch and nothing else.

Everything random is drawn for the whole epoch and all processes, and belongs to a *position* in the epoch; a process
then takes its share of the positions. So runs with one and with many processes see the same global batches, a resumed
run sees the batches it would have seen, and evaluation never touches the random state of training.
"""

import hashlib
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Makes the CPU generator that everything random in an epoch is drawn from.

    The pair is hashed: with ``seed + epoch``, epoch 1 of seed 0 would replay epoch 0 of seed 1. Four bytes are all that
    PyTorch's CPU generator (MT19937) keeps of a seed.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _permute(size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator)


def share_of_batch(batch_size: int, world_size: int) -> int:
    """How many samples of a global batch each process takes.

    Raises:
        ValueError: they cannot share it equally.
    """
    share, remainder = divmod(batch_size, world_size)
    if remainder or share < 1:
        raise ValueError(
            f"batch_size={batch_size} is the global batch and cannot be shared by {world_size} processes: "
            f"choose a positive multiple of {world_size}."
        )
    return share


class EpochSampler(SequentialSampler):
    """The positions of an epoch that one process visits, step by step.

    (It is no ``SequentialSampler`` of PyTorch but in name: any other one Lightning would replace for
    ``overfit_batches``.)

    Args:
        size: N, the number of samples in the split.
        batches: for each step, the positions in [0, N) that this process takes, int64 ``(B,)``.
        seed: seed of everything that is drawn for the epoch.
        shuffle: whether the samples are permuted before positions are given out.

    Attributes:
        positions: the positions of all steps, one after the other, int64 ``(M,)``.
        steps: for each step, its slice of ``positions``.
        epoch: the epoch that the next iteration draws.
        permute: how samples are permuted: given N and a generator, an order ``(N,)`` int64. Any order is as
            likely as any other, unless a data set replaces this.
        repeat: whether each epoch has the order of epoch 0, as where the same few batches are to be learnt by heart;
            what else is drawn is new in each.
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
        """Cuts an epoch into global batches of ``batch_size`` and takes the equal share of ``rank`` from each.

        The last, smaller batch is shared equally too, because distributed training averages the gradients of the
        processes with equal weight; where it does not divide, it is filled up from the start of the epoch. So it is
        where a process would get a single image, of which batch norm knows no variance, unless all batches are such.
        """
        share = share_of_batch(batch_size, world_size)
        full, rest = divmod(size, batch_size)
        batches = list(torch.arange(full * batch_size).view(full, world_size, share)[:, rank])
        if rest and not drop_last:
            share = max(-(-rest // world_size), min(share, 2))
            batches.append((full * batch_size + rank * share + torch.arange(share)) % size)
        if not batches:
            raise ValueError(
                f"drop_last=True leaves no training batch: {size} images are fewer than batch_size={batch_size}. "
                "Lower batch_size or set drop_last=False."
            )
        return cls(size, batches, seed=seed, shuffle=shuffle)

    @classmethod
    def for_evaluation(cls, size: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> "EpochSampler":
        """Shares out every sample exactly once, in order, with the same number of steps on every process.

        The global batches are made as equal as possible instead of leaving a small one at the end (10,000 images at 512
        are 20 batches of 500): then each of them has a sample for every process, and no process runs dry while others
        wait for it in a collective.
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
        """Chooses the epoch that the next iteration draws; Lightning calls this before each epoch."""
        self.epoch = epoch

    def draw_order(self) -> tuple[Tensor, torch.Generator]:
        """Draws which sample stands at each position of the epoch.

        Returns:
            the order ``(N,)`` int64, and the generator to draw the augmentation of the N positions from.
        """
        generator = epoch_generator(self.seed, self.epoch)
        if not self.shuffle:
            return torch.arange(self.size), generator
        return self.permute(self.size, epoch_generator(self.seed, 0) if self.repeat else generator), generator
