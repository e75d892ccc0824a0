"""Progress bar on one line of 80 columns: epochs counted from 1, and the time left of the whole run.

Without a terminal, a line a minute.
"""

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, Timer
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomBarColumn
from rich.progress import ProgressColumn, Task, TextColumn
from rich.table import Column

from rld_lightning.console import console, duration, print_line
from rld_lightning.progress_bar import BAR, PRINT_SECONDS, TimeLeft
from rld_lightning.trainer_callbacks import callbacks_of

# Metrics that the bar shows: name as logged, and label.
_SHOWN = {"loss": "loss", "val/top1": "top-1 %"}


class RunProgress(RichProgressBar):
    """Lightning's bar with other columns: epoch, batches, time left of the run, the loss and the last accuracy.

    Args:
        refresh_rate: draws per second.
    """

    reads_values_itself = True  # see `shown_by_lightning`

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._began = (0.0, 0)  # time, and batches of the run before it
        self._batches = 0
        self._drawn = 0.0  # time of the last draw
        self._printed = 0.0  # time of the last line without a terminal

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stores the position at the start, as the run may be resumed."""
        self._batches = _batches_before(trainer)
        self._began = time.monotonic(), self._batches
        self._printed = self._began[0]
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Counts a batch and redraws if it is time."""
        self._batches += 1
        # Not after each batch: reading the values synchronises with the device.
        now, is_last = time.monotonic(), trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if self.is_enabled and (is_last or now - self._drawn >= 1 / self.refresh_rate):
            self._drawn = now
            super().on_train_batch_end(trainer, pl_module, *args)
            if self._is_time_to_print():
                epoch = self._get_train_description(trainer.current_epoch).split()[1]
                batches = f"{trainer.fit_loop.epoch_loop.batch_progress.current.ready}/{trainer.num_training_batches}"
                values = [f"{name}: {value}" for name, value in self.get_metrics(trainer, pl_module).items()]
                self._print(trainer, "epoch", epoch, f"batch {batches}", *values)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to count the batches of an evaluation."""
        self._batches = 0
        self._began = time.monotonic(), 0
        self._printed = self._began[0]
        super().on_test_start(trainer, pl_module)

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **others: Any) -> None:
        """Counts a batch."""
        self._batches += 1
        super().on_test_batch_end(trainer, *args, **others)
        if self.is_enabled and self._is_time_to_print():
            self._print(trainer, "evaluate", f"batch {self._batches}/{sum(trainer.num_test_batches)}")

    def _is_time_to_print(self) -> bool:
        now = time.monotonic()
        if console.is_terminal or now - self._printed < PRINT_SECONDS:
            return False
        self._printed = now
        return True

    def _print(self, trainer: Trainer, name: str, *parts: str) -> None:
        seconds = self.seconds_left(trainer)
        print_line(name, ", ".join([*parts, *([] if seconds is None else [f"{duration(seconds)} left"])]))

    def seconds_left(self, trainer: Trainer) -> float | None:
        """Returns the time left of the run, or of an evaluation, at the mean pace so far; None if unknown.

        ``trainer.max_time`` may end the run earlier.
        """
        began, before = self._began
        total = _batches_in_all(trainer)
        if self._batches <= before:
            return None
        pace = (time.monotonic() - began) / (self._batches - before)
        ends = [] if total is None else [pace * (total - self._batches)]
        timers = [] if trainer.testing else callbacks_of(trainer, Timer)
        ends += [left for timer in timers if (left := timer.time_remaining()) is not None]
        return max(0.0, min(ends)) if ends else None

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Returns the columns before the metrics, which Lightning adds."""
        described = TextColumn("{task.description}", table_column=Column(no_wrap=True))
        return [described, CustomBarColumn(**BAR), BatchesProcessedColumn(style=""), _TimeLeftOfRun(self, trainer)]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Returns the loss and the last accuracy as text."""
        metrics = super().get_metrics(trainer, pl_module)
        if "loss" in trainer.callback_metrics:
            metrics["loss"] = float(trainer.callback_metrics["loss"])
        return {shown: f"{metrics[name]:.4g}" for name, shown in _SHOWN.items() if name in metrics}

    def _should_update(self, current: int, total: int | float) -> bool:
        return True  # before 2.6.1 Lightning takes refresh_rate for a number of batches; redraws are timed above

    def _init_progress(self, trainer: Trainer) -> None:
        super()._init_progress(trainer)
        if self._metric_component is not None:
            self._metric_component._table_column = Column(no_wrap=True, overflow="ellipsis")

    @property
    def test_description(self) -> str:
        """What stands before the bar of an evaluation, of whatever split."""
        return "Evaluation"

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs
        of = f"/{epochs}" if epochs is not None and epochs > 0 else ""
        return f"{f'Epoch {current_epoch + 1}{of}':{len(self.validation_description)}}"


class _TimeLeftOfRun(TimeLeft):
    """Column with the time left of the run, next to the bar of training or of an evaluation."""

    def __init__(self, bar: RunProgress, trainer: Trainer) -> None:
        super().__init__()
        self.bar, self.trainer = bar, trainer

    def seconds(self, task: Task) -> float | None:
        """Returns the time left; None until it is known."""
        own = (self.bar.train_progress_bar_id, self.bar.test_progress_bar_id)
        return self.bar.seconds_left(self.trainer) if task.id in own else None


def _batches_before(trainer: Trainer) -> int:
    within = trainer.fit_loop.epoch_loop.batch_progress.current.ready if trainer.fit_loop.restarting else 0
    batches = trainer.num_training_batches
    return 0 if math.isinf(batches) else int(trainer.current_epoch * batches + within)


def _batches_in_all(trainer: Trainer) -> int | None:
    """Returns None for an unlimited run."""
    if trainer.testing:
        batches = sum(trainer.num_test_batches)
        return None if math.isinf(batches) else int(batches)
    ends = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and not math.isinf(trainer.num_training_batches):
        ends.append(trainer.max_epochs * int(trainer.num_training_batches))
    if trainer.max_steps >= 0:
        every, of_epoch, full = trainer.accumulate_grad_batches, trainer.num_training_batches, 0
        steps = trainer.max_steps
        if not math.isinf(of_epoch):  # an epoch's last step may have fewer batches
            epochs, steps = divmod(steps, math.ceil(of_epoch / every))
            full = epochs * int(of_epoch)
        ends.append(full + steps * every)
    return min(ends) if ends else None
