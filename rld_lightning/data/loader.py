"""The base class of the loaders, for data in memory and on disk."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from rld_lightning.data.base import Batch
from rld_lightning.data.mix import Mix, MixDraw, Other, mix_images
from rld_lightning.data.sampler import EpochSampler


class EpochLoader(ABC):
    """An iterable over the batches of a sampler's epoch that can resume within an epoch.

    It is not a ``torch.utils.data.DataLoader``, so that Lightning neither replaces its sampler nor pads its batches.
    ``batch_size`` is the largest batch of this process.

    In your own loop, each complete iteration advances the sampler to the next epoch; after an incomplete one the same
    epoch starts over. ``loader.sampler.set_epoch(epoch)`` selects an epoch, as Lightning does.
    """

    batch_sampler = None  # Lightning reads it beside ``sampler``

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        self.mix: Mix | None = None
        self.batch_size = max(step.stop - step.start for step in sampler.steps)
        self._progress: dict[str, int] | None = None
        self._resume: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator starts at its first `next`. Lightning creates a resumed run's iterator before it sets the epoch,
        # so anything drawn eagerly would belong to epoch 0.
        epoch = self.sampler.epoch
        start = self._resume["batch"] if self._resume and self._resume["epoch"] == epoch else 0
        self._resume = None
        for step, batch in enumerate(self._batches(start), start + 1):
            self._progress = {"epoch": epoch, "batch": step}
            yield mixed(batch, self.mix.draw(epoch, step, *batch.images.shape[2:])) if self.mix else batch
        # Not reached in Lightning, which stops at the last batch and sets each epoch itself.
        self.sampler.set_epoch(epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch of the last batch, and how many batches of it were yielded."""
        return dict(self._progress or {"epoch": self.sampler.epoch, "batch": 0})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes at the saved position, with the next epoch if that was the end of one.

        The first batches are skipped only if the next iteration is of the same epoch.
        """
        self._resume, self._progress = dict(state_dict), dict(state_dict)
        self.sampler.set_epoch(state_dict["epoch"] + (state_dict["batch"] >= len(self)))

    @abstractmethod
    def _batches(self, start: int) -> Iterator[Batch]:
        """Yields the batches of the sampler's epoch from step ``start`` on."""


def mixed(batch: Batch, draw: MixDraw) -> Batch:
    """Mixes the images of a batch, both views alike."""
    return batch._replace(
        images=mix_images(batch.images, draw),
        strong=None if batch.strong is None else mix_images(batch.strong, draw),
        view=None,
        other=Other(batch.label.roll(1), draw.share),
    )
