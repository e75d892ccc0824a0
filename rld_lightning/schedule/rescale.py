"""Changes the learning rate of a resumed run: its schedule keeps its position, and all its rates are scaled."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

# Keys of learning rates in the parameter groups of PyTorch's optimisers, and attributes of its schedules.
_OF_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr")
_OF_SCHEDULES = ("base_lrs", "_last_lr", "min_lrs", "max_lrs")


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
