"""``metrics.csv``: what a run logs, one row an epoch."""

import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from rld_lightning.distributed import rank_zero_only
from rld_lightning.runs.metrics_csv import Row, write_rows

_SECONDS = 10.0


class MetricsFile(Logger):
    """Writes what is logged with an epoch to ``metrics.csv``, which is always whole: one row an epoch.

    The loss of single steps, and what callbacks log at them, is for other loggers. Checkpoints have the rows up to
    where they stand (:class:`~rld_lightning.callbacks.ExactResume`), so that a run that goes on, here or in another
    folder, has each row once, as if it had never stopped.

    Args:
        save_dir: the run folder.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.folder = Path(save_dir)
        self.rows: list[Row] = []
        self._ended = False
        self._part = False  # whether the epoch whose values came last has others to come
        self._written = float("-inf")  # when

    @property
    def name(self) -> str:
        """Nothing: the file lies in the run folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Nothing, likewise."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    @rank_zero_only
    def begin(self, rows: Iterable[Row]) -> None:
        """Goes on after the rows of a checkpoint; whatever was written later is gone."""
        self.rows = [dict(row) for row in rows]
        write_rows(self.folder, self.rows)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Notes the values of an epoch; what is measured after training belongs to its last one."""
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
        """Nothing: they are in ``config.yaml``."""

    @rank_zero_only
    def save(self) -> None:
        """Writes the file; between a validation and the end of its epoch only if the last time is a while ago."""
        if self.rows and not (self._part and time.monotonic() - self._written < _SECONDS):
            self._written = time.monotonic()
            write_rows(self.folder, self.rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Notes that the training has ended."""
        self._ended, self._part = True, False
        self.save()
