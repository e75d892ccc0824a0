"""Progress bar on one line of 80 columns: epochs counted from 1, and the time left of the whole run.

Without a terminal, a line a minute.
"""

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomBarColumn
from rich.progress import ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from rld_lightning.console import console, duration, print_line

# Metrics that the bar shows: name as logged, and label.
_SHOWN = {"loss": "loss", "val/top1": "top-1 %"}
_PRINT_SECONDS = 60  # between the lines of a run without a terminal


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
        now = time.monotonic()
        if self.is_enabled and (trainer.is_last_batch or now - self._drawn >= 1 / self.refresh_rate):
            self._drawn = now
            super().on_train_batch_end(trainer, pl_module, *args)
            if not console.is_terminal and now - self._printed >= _PRINT_SECONDS:
                self._printed = now
                self._print(trainer, pl_module)

    def _print(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = self._get_train_description(trainer.current_epoch).split()[1]
        batches = f"{trainer.fit_loop.epoch_loop.batch_progress.current.ready}/{trainer.num_training_batches}"
        values = [f"{name}: {value}" for name, value in self.get_metrics(trainer, pl_module).items()]
        seconds = self.seconds_left(trainer)
        left = [] if seconds is None else [f"{duration(seconds)} left"]
        print_line("epoch", ", ".join([epoch, f"batch {batches}", *values, *left]))

    def seconds_left(self, trainer: Trainer) -> float | None:
        """Returns the time left at the mean pace, validation included; None if unknown."""
        began, before = self._began
        total = _batches_in_all(trainer)
        if total is None or self._batches <= before:
            return None
        pace = (time.monotonic() - began) / (self._batches - before)
        return pace * max(0, total - self._batches)

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Returns the columns before the metrics, which Lightning adds."""
        bar = CustomBarColumn(
            bar_width=12,
            complete_style=self.theme.progress_bar,
            finished_style=self.theme.progress_bar_finished,
            pulse_style=self.theme.progress_bar_pulse,
        )
        line = Column(no_wrap=True)
        described = TextColumn("{task.description}", table_column=line)
        return [described, bar, BatchesProcessedColumn(style=""), _TimeLeft(self, trainer)]

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

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs
        of = f"/{epochs}" if epochs is not None and epochs > 0 else ""
        return f"{f'Epoch {current_epoch + 1}{of}':{len(self.validation_description)}}"


class _TimeLeft(ProgressColumn):
    """Column with the time left of the run, next to the training bar."""

    max_refresh = 0.5  # seconds

    def __init__(self, bar: RunProgress, trainer: Trainer) -> None:
        super().__init__(Column(no_wrap=True))
        self.bar, self.trainer = bar, trainer

    def render(self, task: Task) -> Text:
        """Returns the time left; empty until it is known."""
        seconds = self.bar.seconds_left(self.trainer) if task.id == self.bar.train_progress_bar_id else None
        return Text("" if seconds is None else f"{duration(seconds)} left", style="dim")


def _batches_before(trainer: Trainer) -> int:
    within = trainer.fit_loop.epoch_loop.batch_progress.current.ready if trainer.fit_loop.restarting else 0
    batches = trainer.num_training_batches
    return 0 if math.isinf(batches) else int(trainer.current_epoch * batches + within)


def _batches_in_all(trainer: Trainer) -> int | None:
    """Returns None for an unlimited run."""
    ends = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and not math.isinf(trainer.num_training_batches):
        ends.append(trainer.max_epochs * int(trainer.num_training_batches))
    if trainer.max_steps >= 0:
        ends.append(trainer.max_steps * trainer.accumulate_grad_batches)
    return min(ends) if ends else None
