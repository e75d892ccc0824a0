"""The checkpoint from which a run resumes."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from rld_lightning.callbacks.checkpoint_files import files_of, write_in_background
from rld_lightning.callbacks.exact_resume import position
from rld_lightning.runs.files import LAST


class LastCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt``: after each epoch, within a long epoch every few minutes or steps, and when a run stops.

    Whatever ends a run costs no more than that interval. Within shorter epochs nothing is written. After an epoch, the
    file is written in the background, if a :class:`~rld_lightning.callbacks.CheckpointFiles` writes it; a failure stops
    the run within a step, and the end of the run waits for the file.

    A stop while gradients are being accumulated, which no checkpoint contains, waits for the optimizer step.

    Args:
        dirpath: the directory to write to.
        minutes: maximum time since the last checkpoint; None for no limit.
        steps: maximum number of optimizer steps since then; None for no limit.

    Raises:
        ValueError: ``minutes`` or ``steps`` is not positive.
    """

    def __init__(self, dirpath: str | Path, *, minutes: float | None = 10.0, steps: int | None = None) -> None:
        super().__init__(dirpath, filename=Path(LAST).stem, save_on_train_epoch_end=True, enable_version_counter=False)
        for name, value in (("minutes", minutes), ("steps", steps)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} between checkpoints must be positive; null for the end of epochs.")
        self.minutes = minutes
        self.steps = steps
        self._stop = False
        self._saved = (0.0, 0)  # time and step of the last save
        self._looks = (0.0, 0, 0)  # time and step of the last check of the clock, and step of the next one

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._stop = False
        self._restart(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if it is time, or if the run stops; raises an error of the last file."""
        if (files := files_of(trainer)) is not None:
            files.check()
        stop = self._stop or trainer.should_stop
        accumulating = trainer.fit_loop._should_accumulate()
        self._stop, trainer.should_stop = stop and accumulating, stop and not accumulating
        if accumulating or position(trainer).batch >= trainer.num_training_batches:  # saved at the epoch's end
            return
        ends = (stop and trainer.fit_loop._can_stop_early) or trainer.global_step == trainer.max_steps
        if ends or self._is_time(trainer):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves a checkpoint."""
        with write_in_background(trainer):
            super().on_train_epoch_end(trainer, pl_module)
        self._restart(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits for the last file."""
        if (files := files_of(trainer)) is not None:
            files.wait()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves for a run that was resumed in another directory with nothing left to train."""
        there = trainer.strategy.broadcast((Path(str(self.dirpath)) / LAST).exists())
        if not (there or self._should_skip_saving_checkpoint(trainer)):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def save(self, trainer: Trainer) -> None:
        """Saves now, on all ranks; must be between two optimizer steps."""
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._restart(trainer)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """Returns nothing: neither the file's name nor whether it is saved depends on a value; Lightning copies all."""
        return {}

    def _restart(self, trainer: Trainer) -> None:
        self._saved = (time.monotonic(), trainer.global_step)
        self._looks = (*self._saved, trainer.global_step + 1)

    def _is_time(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if self.steps is not None and step - self._saved[1] >= self.steps:
            return True
        if self.minutes is None or step < self._looks[2]:
            return False
        # Agreeing makes the ranks wait for each other: rarely, at steps that all ranks know.
        now, (before, since, _) = time.monotonic(), self._looks
        left = self._saved[0] + 60 * self.minutes - now
        steps = 1 + int(max(0.0, left) / 2 * (step - since) / max(now - before, 1e-3))
        due, steps = trainer.strategy.broadcast((left <= 0, steps))
        self._looks = (now, step, step + steps)
        return bool(due)
