"""Another learning rate for a run that goes on: its schedule stays where it is, and all its rates are scaled."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

# What optimisers and schedules of PyTorch call learning rates, in groups of parameters and in schedules.
_OF_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr")
_OF_SCHEDULES = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")


def first_rates(optimizer: Optimizer) -> list[float | None]:
    """The learning rate of each group of parameters where the schedule begins; None where the group does not say."""
    return [group.get("initial_lr") for group in optimizer.param_groups]


def remember_first_rates(optimizer: Optimizer) -> list[float | None]:
    """As :func:`first_rates`, of a fresh optimizer, which is made to say so in checkpoints as well.

    Most schedules do that by themselves; ``ReduceLROnPlateau`` does not.
    """
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    return first_rates(optimizer)


def rescale(optimizer: Optimizer, schedulers: Iterable[Any], rates: Sequence[float | None]) -> None:
    """Scales all learning rates of a restored optimizer so that its schedule is the one that begins with others.

    Where they are the same already, nothing is touched.

    Args:
        rates: as :func:`remember_first_rates` gave them before the state was restored.
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
        if isinstance(rates, list):  # in place: a schedule made of others shares it with them
            rates[:] = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
    for inner in state.get("_schedulers", ()):
        _rescale_schedule(vars(inner), factors)
