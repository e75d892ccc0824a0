"""A schedule for a run's optimizer."""

import inspect
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def make_schedule(make: Callable[..., LRScheduler], optimizer: Optimizer, steps: Callable[[], int]) -> LRScheduler:
    """A schedule for an optimizer; one that takes ``total_steps`` and has none is given the run's.

    Args:
        steps: of the whole run; asked where it is needed, because counting them sets up the data.
    """
    parameters = inspect.signature(make).parameters
    wants_steps = "total_steps" in parameters and parameters["total_steps"].default is None
    return make(optimizer, **({"total_steps": steps()} if wants_steps else {}))
