"""Schedules of the learning rate that PyTorch has only in parts."""

import math
from bisect import bisect_right
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosine(LRScheduler):
    """A linear rise over the first steps, and half a cosine down over the others.

    With the learning rate r, N steps in all and W of them for the rise, step n = 0, 1, ... is taken at::

        r (n + 1) / W                                                     for n < W
        r (final + (1 - final) (1 + cos(pi (n - W) / (N - W))) / 2)       from then on

    (Goyal et al., arXiv 1706.02677; Loshchilov and Hutter, ICLR 2017, arXiv 1608.03983.)

    Args:
        optimizer: whose rate it is.
        total_steps: N; in a run the run's own.
        warmup: W as a share of N, in [0, 1).
        final: where the cosine ends, as a share of r, in [0, 1].
        last_epoch: the step that was the last one; -1 begins.

    Raises:
        ValueError: an argument out of its range, or no number of steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup: float = 0.05,
        final: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        if total_steps is None or total_steps < 1:
            raise ValueError(f"total_steps={total_steps} of the schedule must be the number of steps, 1 or more.")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup} of the schedule is a share of the steps, in [0, 1), such as 0.05.")
        if not 0 <= final <= 1:
            raise ValueError(f"final={final} of the schedule is a share of the learning rate, in [0, 1].")
        self.total_steps = total_steps
        self.warmup_steps = round(warmup * total_steps)
        self.final = final
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group of parameters."""
        return [rate * self._factor(self.last_epoch) for rate in self.base_lrs]

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


class WarmupMultiStep(LRScheduler):
    """PyTorch's ``MultiStepLR``, with a linear rise before: epoch e = 1, 2, ... of the first W has e / W of the rate.

    Args:
        optimizer: whose rate it is.
        milestones: after so many epochs the rate is multiplied by ``gamma``, in rising order.
        gamma: the factor.
        warmup: W; 1 is no rise.
        last_epoch: the epoch that was the last one; -1 begins.

    Raises:
        ValueError: milestones that do not rise, or no warm-up of 1 or more.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        gamma: float = 0.1,
        warmup: int = 1,
        last_epoch: int = -1,
    ) -> None:
        self.milestones = list(milestones)
        if self.milestones != sorted(self.milestones):
            raise ValueError(f"milestones={self.milestones} of the schedule must rise.")
        if warmup < 1:
            raise ValueError(f"warmup={warmup} of the schedule must be a number of epochs, 1 for no rise.")
        self.gamma = gamma
        self.warmup = warmup
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group of parameters."""
        rise = min((self.last_epoch + 1) / self.warmup, 1.0)
        return [rate * rise * self.gamma ** bisect_right(self.milestones, self.last_epoch) for rate in self.base_lrs]
