"""Creates the schedule of a run's optimizer."""

import inspect
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def make_schedule(make: Callable[..., LRScheduler], optimizer: Optimizer, steps: Callable[[], int]) -> LRScheduler:
    """Creates a schedule for an optimizer; passes the run's number of steps if ``total_steps`` is required and unset.

    Args:
        steps: returns the number of steps of the whole run; called only if needed, because it sets up the data.
    """
    parameters = inspect.signature(make).parameters
    wants_steps = "total_steps" in parameters and parameters["total_steps"].default is None
    return make(optimizer, **({"total_steps": steps()} if wants_steps else {}))
