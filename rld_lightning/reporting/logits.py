"""The interface by which figures get logits; :mod:`rld_lightning.tasks.logit_reader` runs the networks."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rld_lightning.runs.finished import Run


@dataclass(frozen=True)
class RunLogits:
    """The logits of a run's student and teacher."""

    student: Tensor  # `(N, C)` float32
    teacher: Tensor  # `(N, C)` float32
    label: Tensor  # `(N,)` int64
    index: Tensor  # `(N,)` int64, positions in the split
    class_names: list[str]  # the C names


class LogitSource(Protocol):
    """Returns a run's logits on the images that it was validated on."""

    def read(self, run: Run) -> RunLogits:
        """Returns the logits of a run's student and teacher."""

    def image(self, run: Run, index: int) -> Tensor:
        """Returns one validation image of a run, ``(H, W, 3)`` with values in [0, 1]."""
