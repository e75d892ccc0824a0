"""Saves a run's position so that it resumes exactly from any step."""

import time
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from rld_lightning.callbacks.metrics_file import MetricsFile
from rld_lightning.callbacks.own_settings import OwnSettings
from rld_lightning.runs.checkpoint_form import count_states, refuse_other_progress
from rld_lightning.runs.metrics_csv import Row, known_rows
from rld_lightning.trainer_callbacks import callbacks_of


class Position(NamedTuple):
    """A run's position."""

    epoch: int  # finished epochs
    batch: int  # finished batches of the current epoch; all of them if only the epoch's end is missing
    step: int  # optimizer steps


def position(trainer: Trainer) -> Position:
    """Returns the position, in any hook; an epoch that ended before its last batch counts as unfinished."""
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current  # has more fields than its declared type
    batch: Any = loop.epoch_loop.batch_progress.current
    last, within = trainer.num_training_batches, epochs.started > epochs.completed
    if within and batch.processed >= last and epochs.processed > epochs.completed:  # the epoch's end has started
        return Position(epochs.completed + 1, 0, trainer.global_step)
    if within:
        return Position(epochs.completed, batch.processed, trainer.global_step)
    if 0 < batch.processed < last:  # the epoch was cut short there
        return Position(epochs.completed - 1, batch.processed, trainer.global_step)
    return Position(epochs.completed, 0, trainer.global_step)


class ExactResume(Callback):
    """Writes the position into each checkpoint in a form from which Lightning's loops resume exactly.

    Also adds the rows of ``metrics.csv`` so far, and the training time.

    By themselves, Lightning's loops skip the rest of an epoch that ``max_steps``, ``max_time`` or a signal has cut
    short, count its batches as the next epoch's, and forget a validation that was due. Other state within an epoch is
    saved by its owners (their ``state_dict``).

    Attributes:
        start_step: the step from which the run resumed; None for a new run.
    """

    def __init__(self) -> None:
        self.start_step: int | None = None
        self._earlier = 0.0
        self._since: float | None = None  # when training started

    @property
    def seconds(self) -> float:
        """Training time in seconds, including the time before a resume."""
        return self._earlier + (0.0 if self._since is None else time.monotonic() - self._since)

    def state_dict(self) -> dict[str, Any]:
        """Returns the training time."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the time before the resume."""
        self._earlier = float(state_dict["seconds"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rewrites the loops' progress, and adds the metrics' rows."""
        count_states(checkpoint)
        checkpoint["loops"]["fit_loop"] |= _progress(trainer)
        for logger in _metrics_files(trainer):
            checkpoint["metrics"] = _rows(trainer, logger)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stores the step from which the run resumes."""
        self.start_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the rest of a checkpoint before it is restored, and restores the rows of the metrics file.

        A run that was stopped early is not continued.
        """
        if self.start_step is None:
            return
        checkpoint = trainer._checkpoint_connector._loaded_checkpoint
        own = next((known.before.settings for known in callbacks_of(trainer, OwnSettings)), None)
        refuse_other_progress(checkpoint, trainer, own)
        for logger in _metrics_files(trainer):
            logger.restore(known_rows(checkpoint.get("metrics")))
        if has_stopped_early(trainer):  # as Lightning's Timer does
            trainer.should_stop = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock; corrects Lightning with ``max_steps``, which takes any epoch for restarted."""
        self._since = time.monotonic()
        if position(trainer).batch == 0:
            trainer.fit_loop.epoch_loop.restarting = False


def has_stopped_early(trainer: Trainer) -> bool:
    """Whether early stopping has ended the run, possibly before the checkpoint from which it resumes."""
    stoppings = callbacks_of(trainer, EarlyStopping)
    return any(stopping.wait_count >= stopping.patience or stopping.stopped_epoch > 0 for stopping in stoppings)


def _progress(trainer: Trainer) -> dict[str, Any]:
    """Returns the progress as Lightning stores it between two batches, or between two epochs."""
    epoch, batch, step = position(trainer)
    loop = trainer.fit_loop.epoch_loop
    whole = batch >= trainer.num_training_batches
    due = batch > 0 and _validation_is_due(trainer, epoch, batch)
    waiting = due and not loop._should_accumulate()  # a validation is due, and Lightning has not counted the step yet
    total: Any = loop.batch_progress.total
    epochs = _counts(epoch + (batch > 0), epoch)
    return {
        "epoch_progress": {"total": epochs, "current": dict(epochs)},
        "epoch_loop.state_dict": {"_batches_that_stepped": step - waiting},
        "epoch_loop.batch_progress": {
            "total": _counts(total.processed, total.processed),
            "current": _counts(batch, batch),
            "is_last_batch": whole,
        },
        # From one batch that is started but not completed, Lightning concludes that a validation is to be run.
        "epoch_loop.val_loop.batch_progress": {
            "total": _counts(int(due), 0),
            "current": _counts(0, 0),
            "is_last_batch": False,
        },
    }


def _metrics_files(trainer: Trainer) -> list[MetricsFile]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]


def _rows(trainer: Trainer, logger: MetricsFile) -> list[Row]:
    """Returns the rows up to the position; at an epoch's end with its values, which are only logged later."""
    epoch, batch, step = position(trainer)
    rows = [dict(row) for row in logger.rows if row["epoch"] <= epoch - (batch == 0)]
    if batch == 0 and trainer.fit_loop.epoch_progress.current.completed < epoch:
        ended = trainer._logger_connector.metrics["log"]
        if not rows or rows[-1]["epoch"] < epoch - 1:
            rows.append({"epoch": epoch - 1})
        rows[-1] |= {"step": step - 1, **{name: float(value) for name, value in ended.items()}}
    return rows


def _validation_is_due(trainer: Trainer, epoch: int, batch: int) -> bool:
    """Whether a validation is scheduled after these batches of the epoch."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (epochs is not None and (epoch + 1) % epochs):
        return False
    if every is None or every == float("inf"):  # by the time, or at the epoch's end
        return every is not None and batch >= trainer.num_training_batches
    return (batch if epochs is not None else trainer.fit_loop.total_batch_idx + 1) % every == 0


def _counts(begun: int, ended: int) -> dict[str, int]:
    return {"ready": begun, "started": begun, "processed": ended, "completed": ended}
