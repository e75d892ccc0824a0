"""What networks say about images, as figures get it; :mod:`rld_lightning.tasks.logit_reader` runs the networks."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rld_lightning.runs.finished import Run


@dataclass(frozen=True)
class RunLogits:
    """Logits of both networks of a run."""

    student: Tensor  # `(N, C)` float32
    teacher: Tensor  # `(N, C)` float32
    label: Tensor  # `(N,)` int64
    index: Tensor  # `(N,)` int64, positions in the split
    class_names: list[str]  # the C names


class LogitSource(Protocol):
    """Gives what a run's networks say about the images that the run was validated on."""

    def read(self, run: Run) -> RunLogits:
        """The logits of a run's student and teacher."""

    def image(self, run: Run, index: int) -> Tensor:
        """One validation image of a run, ``(H, W, 3)`` with values in [0, 1]."""
