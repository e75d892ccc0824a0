"""Learning rate schedules with warm-up."""

import math
from bisect import bisect_right
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosine(LRScheduler):
    """Linear warm-up, then cosine decay.

    With the learning rate r, N steps in total and W warm-up steps, the rate of step n = 0, 1, ... is::

        r (n + 1) / W                                                     for n < W
        r (final + (1 - final) (1 + cos(pi (n - W) / (N - W))) / 2)       afterwards

    (Goyal et al., arXiv 1706.02677; Loshchilov and Hutter, ICLR 2017, arXiv 1608.03983.)

    Args:
        optimizer: the optimizer to schedule.
        total_steps: N; in a run, set to the run's number of steps.
        warmup: W as a share of N, in [0, 1).
        final: final rate of the cosine, as a share of r, in [0, 1].
        last_epoch: the last finished step; -1 to start.

    Raises:
        ValueError: an argument is out of its range, or there is no number of steps.
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
        """Returns the rate of each parameter group."""
        return [rate * self._factor(self.last_epoch) for rate in self.base_lrs]

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


class WarmupMultiStep(LRScheduler):
    """PyTorch's ``MultiStepLR`` with linear warm-up: of the first W epochs, epoch e = 1, 2, ... has e / W of the rate.

    Args:
        optimizer: the optimizer to schedule.
        milestones: numbers of epochs after which the rate is multiplied by ``gamma``, in ascending order.
        gamma: the factor.
        warmup: W; 1 for no warm-up.
        last_epoch: the last finished epoch; -1 to start.

    Raises:
        ValueError: the milestones are not in ascending order, or the warm-up is below 1.
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
            raise ValueError(f"milestones={self.milestones} of the schedule must be in ascending order.")
        if warmup < 1:
            raise ValueError(f"warmup={warmup} of the schedule must be a number of epochs, 1 for no warm-up.")
        self.gamma = gamma
        self.warmup = warmup
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Returns the rate of each parameter group."""
        rise = min((self.last_epoch + 1) / self.warmup, 1.0)
        return [rate * rise * self.gamma ** bisect_right(self.milestones, self.last_epoch) for rate in self.base_lrs]
