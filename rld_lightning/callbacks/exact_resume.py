"""Where a run stands, so that it goes on from any step as if it had never stopped."""

import time
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from rld_lightning.callbacks.metrics_file import MetricsFile
from rld_lightning.callbacks.own_settings import OwnSettings
from rld_lightning.runs.checkpoint_form import count_states, refuse_other_progress
from rld_lightning.runs.metrics_csv import Row, known_rows
from rld_lightning.watching import callbacks_of


class Position(NamedTuple):
    """How far a run has come."""

    epoch: int  # finished epochs
    batch: int  # finished batches of the next one; all of them where it lacks its end alone
    step: int  # steps of the optimizer


def position(trainer: Trainer) -> Position:
    """Where a run stands, in whichever hook; an epoch that ended before its last batch counts as begun."""
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current  # which counts more than its declared type says
    batch: Any = loop.epoch_loop.batch_progress.current
    last, within = trainer.num_training_batches, epochs.started > epochs.completed
    if within and batch.processed >= last and epochs.processed > epochs.completed:  # its end has begun
        return Position(epochs.completed + 1, 0, trainer.global_step)
    if within:
        return Position(epochs.completed, batch.processed, trainer.global_step)
    if 0 < batch.processed < last:  # it had to end there
        return Position(epochs.completed - 1, batch.processed, trainer.global_step)
    return Position(epochs.completed, 0, trainer.global_step)


class ExactResume(Callback):
    """Writes into each checkpoint where the run stands, in the way that Lightning's loops go on from exactly.

    And the rows of ``metrics.csv`` up to there, and the time that they took.

    Left to themselves, these skip the rest of an epoch that ``max_steps``, ``max_time`` or a signal has cut short, take
    its batches for those of the next one, and forget a validation that was due. Everything else that an epoch has
    gathered is kept by those who gather it (their ``state_dict``).

    Attributes:
        began: the step that the run goes on from; None where it begins.
    """

    def __init__(self) -> None:
        self.began: int | None = None
        self._earlier, self._since = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, with what came before the checkpoint that it goes on from."""
        return self._earlier + time.monotonic() - self._since

    def state_dict(self) -> dict[str, Any]:
        """The time so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adds what came before."""
        self._earlier = float(state_dict["seconds"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Rewrites the progress of the loops, and adds the rows."""
        count_states(checkpoint)
        checkpoint["loops"]["fit_loop"] |= _progress(trainer)
        for logger in _files(trainer):
            checkpoint["metrics"] = _rows(trainer, logger)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes where the run goes on."""
        self.began = checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the rest of a checkpoint before it is restored, and lets the file of metrics go on from its rows.

        A run that has stopped early is at its end.
        """
        if self.began is None:
            return
        checkpoint = trainer._checkpoint_connector._loaded_checkpoint
        own = next((known.before.settings for known in callbacks_of(trainer, OwnSettings)), None)
        refuse_other_progress(checkpoint, trainer, own)
        for logger in _files(trainer):
            logger.begin(known_rows(checkpoint.get("metrics")))
        if has_stopped_early(trainer):  # as Lightning's Timer does
            trainer.should_stop = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock, and lets an epoch that begins begin: with ``max_steps``, Lightning takes any for begun."""
        self._since = time.monotonic()
        if position(trainer).batch == 0:
            trainer.fit_loop.epoch_loop.restarting = False


def has_stopped_early(trainer: Trainer) -> bool:
    """Whether an early stopping has ended the run, be it before the checkpoint that it goes on from."""
    stoppings = callbacks_of(trainer, EarlyStopping)
    return any(stopping.wait_count >= stopping.patience or stopping.stopped_epoch > 0 for stopping in stoppings)


def _progress(trainer: Trainer) -> dict[str, Any]:
    """The progress of a run as Lightning notes it between two batches, or between two epochs."""
    epoch, batch, step = position(trainer)
    loop = trainer.fit_loop.epoch_loop
    whole = batch >= trainer.num_training_batches
    due = batch > 0 and _validation_is_due(trainer, epoch, batch)
    waiting = due and not loop._should_accumulate()  # for the validation, before Lightning counts the step
    total: Any = loop.batch_progress.total
    return {
        "epoch_progress": _twice(_counts(epoch + (batch > 0), epoch)),
        "epoch_loop.state_dict": {"_batches_that_stepped": step - waiting},
        "epoch_loop.batch_progress": {
            "total": _counts(total.processed, total.processed),
            "current": _counts(batch, batch),
            "is_last_batch": whole,
        },
        # Of one batch begun and not ended, Lightning makes a validation that is to be run.
        "epoch_loop.val_loop.batch_progress": {
            "total": _counts(int(due), 0),
            "current": _counts(0, 0),
            "is_last_batch": False,
        },
    }


def _files(trainer: Trainer) -> list[MetricsFile]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]


def _rows(trainer: Trainer, logger: MetricsFile) -> list[Row]:
    """The rows up to where a run stands; at the end of an epoch with its values, which are only logged after that."""
    epoch, batch, step = position(trainer)
    rows = [dict(row) for row in logger.rows if row["epoch"] <= epoch - (batch == 0)]
    if batch == 0 and trainer.fit_loop.epoch_progress.current.completed < epoch:
        ended = trainer._logger_connector.metrics["log"]
        if not rows or rows[-1]["epoch"] < epoch - 1:
            rows.append({"epoch": epoch - 1})
        rows[-1] |= {"step": step - 1, **{name: float(value) for name, value in ended.items()}}
    return rows


def _validation_is_due(trainer: Trainer, epoch: int, batch: int) -> bool:
    """Whether the schedule has a validation after these batches of the epoch."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (epochs is not None and (epoch + 1) % epochs):
        return False
    if every is None or every == float("inf"):  # by the clock, or at the epoch's end
        return every is not None and batch >= trainer.num_training_batches
    return (batch if epochs is not None else trainer.fit_loop.total_batch_idx + 1) % every == 0


def _counts(begun: int, ended: int) -> dict[str, int]:
    return {"ready": begun, "started": begun, "processed": ended, "completed": ended}


def _twice(counts: dict[str, int]) -> dict[str, dict[str, int]]:
    return {"total": counts, "current": dict(counts)}
