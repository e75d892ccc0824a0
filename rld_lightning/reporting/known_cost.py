"""Costs of networks as recorded by finished runs; :mod:`rld_lightning.tasks.cost` measures others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

from rld_lightning.runs.finished import Run


@dataclass(frozen=True)
class Cost:
    """A network's cost."""

    parameters: int  # number of weights
    macs: int  # multiply-accumulates for one image
    milliseconds: float | None = None  # for one image at a time; None if not measured
    machine: str = ""  # the machine of the measurement, in words


# Returns a network's cost from its name and runs of its data set; None if unknown.
CostOf = Callable[[str, Sequence[Run]], Cost | None]


def training_cost(runs: Sequence[Run]) -> tuple[float | None, float | None]:
    """Training speed in images per second, and seconds including validation; means over the runs that have them."""
    recorded = [(run.summary.images_per_s, run.summary.seconds) for run in runs]
    speeds, times = ([value for value in values if value and isfinite(value)] for values in zip(*recorded, strict=True))
    return (fmean(speeds) if speeds else None), (fmean(times) if times else None)


def known_cost(name: str, runs: Sequence[Run]) -> Cost | None:
    """The cost of a network from the summary of a run that trained it; None if there is no such run."""
    summary = next((run.summary for run in runs if run.summary.model == name), None)
    return Cost(summary.parameters, summary.macs) if summary else None
