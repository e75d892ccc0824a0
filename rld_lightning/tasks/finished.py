"""A run that is over, with what it still holds, for those who go on with it."""

from collections.abc import Callable
from dataclasses import dataclass

from omegaconf import DictConfig

from rld_lightning.data.base import ImageDataModule
from rld_lightning.module import DistillationModule
from rld_lightning.runs.summary import Summary
from rld_lightning.tasks.run.plan import Plan


@dataclass(frozen=True)
class Finished:
    """A run that has left its results.

    Attributes:
        cfg: its configuration.
        plan: what it was to do.
        data: its data, set up.
        module: its student and its teacher, on the device that they were trained on.
        summary: what it came to.
        fit: does another run, see :func:`~rld_lightning.tasks.run.once.run_once`.
    """

    cfg: DictConfig
    plan: Plan
    data: ImageDataModule
    module: DistillationModule
    summary: Summary
    fit: Callable[[DictConfig], Summary]
