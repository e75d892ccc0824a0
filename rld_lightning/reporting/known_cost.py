"""What networks cost, as far as finished runs know it; :mod:`rld_lightning.tasks.cost` measures the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

from rld_lightning.runs.finished import Run


@dataclass(frozen=True)
class Cost:
    """What a network costs."""

    parameters: int  # number of weights
    macs: int  # multiply-accumulates for one image
    milliseconds: float | None = None  # for one image at a time; None where it was not measured
    machine: str = ""  # what it was measured on, in words


# Gives the cost of a network by name, some runs of its data set at hand; None where nothing is known.
CostOf = Callable[[str, Sequence[Run]], Cost | None]


def training_cost(runs: Sequence[Run]) -> tuple[float | None, float | None]:
    """What a training costs: images a second, and seconds, validation included; means over the runs that say so."""
    told = [(run.summary.images_per_s, run.summary.seconds) for run in runs]
    speeds, times = ([value for value in values if value and isfinite(value)] for values in zip(*told, strict=True))
    return (fmean(speeds) if speeds else None), (fmean(times) if times else None)


def known_cost(name: str, runs: Sequence[Run]) -> Cost | None:
    """What a run that trained a network says about it; None if there is no such run."""
    summary = next((run.summary for run in runs if run.summary.model == name), None)
    return Cost(summary.parameters, summary.macs) if summary else None
