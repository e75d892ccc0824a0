"""The loop over the batches of an epoch, common to data sets in memory and on disk."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from rld_lightning.data.base import Batch
from rld_lightning.data.sampler import EpochSampler


class EpochLoader(ABC):
    """An iterable over the batches of a sampler's epoch that can continue in the middle of one.

    It is no ``torch.utils.data.DataLoader``, so Lightning neither replaces its sampler nor pads its batches. Its
    ``batch_size`` is the largest batch that this process sees.
    """

    batch_sampler = None  # Lightning looks for one beside ``sampler``

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        self.batch_size = max(step.stop - step.start for step in sampler.steps)
        self._progress = {"epoch": 0, "batch": 0}
        self._resume: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator runs from its first `next`. Lightning asks a resumed run's loader for its iterator before it
        # announces the epoch, so anything drawn eagerly would belong to epoch 0.
        epoch = self.sampler.epoch
        start = self._resume["batch"] if self._resume and self._resume["epoch"] == epoch else 0
        self._resume = None
        for step, batch in enumerate(self._batches(start), start + 1):
            self._progress = {"epoch": epoch, "batch": step}
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch of the last batch and how many batches of it were handed out."""
        return dict(self._progress)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration skip the batches that were already seen, if it is of the same epoch."""
        self._resume = dict(state_dict)

    @abstractmethod
    def _batches(self, start: int) -> Iterator[Batch]:
        """Yield the batches of the sampler's epoch from step ``start`` on."""
