"""``metrics.csv``: the logged metrics, one row per epoch."""

import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from rld_lightning.distributed import rank_zero_only
from rld_lightning.runs.metrics_csv import Row, RowWriter

_SECONDS = 10.0


class MetricsFile(Logger):
    """Writes the metrics logged per epoch to ``metrics.csv`` atomically, one row per epoch.

    The loss of single steps, and what callbacks log at them, is for other loggers. Checkpoints contain the rows so far
    (:class:`~rld_lightning.callbacks.ExactResume`), so that a resumed run, here or in another directory, has each row
    once, as if it had never stopped.

    Args:
        save_dir: the run directory.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.folder = Path(save_dir)
        self.rows: list[Row] = []
        self._writer = RowWriter(self.folder)
        self._ended = False
        self._part = False  # whether the latest epoch's row is incomplete
        self._written = float("-inf")  # time of the last write

    @property
    def name(self) -> str:
        """Empty: the file is in the run directory itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty, like the name."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self.folder)

    @rank_zero_only
    def restore(self, rows: Iterable[Row]) -> None:
        """Restores the rows of a checkpoint; later rows are dropped."""
        self.rows, self._writer = [dict(row) for row in rows], RowWriter(self.folder)
        self._writer.write(self.rows)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds an epoch's values; values measured after training belong to the last epoch."""
        values = {name: float(value) for name, value in metrics.items() if name not in ("epoch", "loss")}
        if "epoch" not in metrics or not values:
            return
        epoch = int(metrics["epoch"])
        if not self.rows or (self.rows[-1]["epoch"] < epoch and not self._ended):
            self.rows.append({"epoch": epoch})
        if not self._ended and step is not None:
            self.rows[-1]["step"] = step
        self.rows[-1] |= values
        self._part = not self._ended and all(name.startswith("val/") for name in values)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: they are in ``config.yaml``."""

    @rank_zero_only
    def save(self) -> None:
        """Writes the file; between a validation and its epoch's end only if the last write was a while ago."""
        if self.rows and not (self._part and time.monotonic() - self._written < _SECONDS):
            self._written = time.monotonic()
            self._writer.write(self.rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Records that training has ended."""
        self._ended, self._part = True, False
        self.save()
