"""Learning rate schedules beyond PyTorch's, and changing the learning rate of a resumed run."""

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Keys of learning rates in the parameter groups of PyTorch's optimisers, and attributes of its schedules.
_OF_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr")
_OF_SCHEDULES = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")


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


def make_schedule(make: Callable[..., LRScheduler], optimizer: Optimizer, steps: Callable[[], int]) -> LRScheduler:
    """Creates a schedule for an optimizer; passes the run's number of steps if ``total_steps`` is required and unset.

    Args:
        steps: returns the number of steps of the whole run; called only if needed, because it sets up the data.
    """
    parameters = inspect.signature(make).parameters
    wants_steps = "total_steps" in parameters and parameters["total_steps"].default is None
    return make(optimizer, **({"total_steps": steps()} if wants_steps else {}))


def first_rates(optimizer: Optimizer) -> list[float | None]:
    """Returns the initial learning rate of each parameter group; None if the group does not store it."""
    return [group.get("initial_lr") for group in optimizer.param_groups]


def remember_first_rates(optimizer: Optimizer) -> list[float | None]:
    """Stores the initial learning rates in a fresh optimizer, so that checkpoints contain them, and returns them.

    Most schedules store them themselves; ``ReduceLROnPlateau`` does not.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    return first_rates(optimizer)


def rescale(optimizer: Optimizer, schedulers: Iterable[Any], rates: Sequence[float | None]) -> None:
    """Scales all learning rates of a restored optimizer as if its schedule had started with other initial rates.

    Does nothing if they are equal.

    Args:
        rates: the new initial rates, as returned by :func:`remember_first_rates` before the state was restored.
    """
    before = first_rates(optimizer)
    factors = [float(new) / float(old) if new and old else 1.0 for new, old in zip(rates, before, strict=True)]
    if all(factor == 1 for factor in factors):
        return
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        for name in _OF_GROUPS:
            if name in group:
                group[name] = group[name] * factor
    for scheduler in schedulers:
        _rescale_schedule(vars(scheduler), factors)


def _rescale_schedule(state: Mapping[str, Any], factors: Sequence[float]) -> None:
    for name in _OF_SCHEDULES:
        rates = state.get(name)
        if isinstance(rates, list):  # in place: a composed schedule shares it with its parts
            rates[:] = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
    for inner in state.get("_schedulers", ()):
        _rescale_schedule(vars(inner), factors)
