"""Reads and writes the metrics that a run logs, one row per epoch."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rld_lightning.atomic_files import write_whole
from rld_lightning.runs.files import METRICS

if TYPE_CHECKING:
    import pandas as pd

# An epoch's values by name, with ``epoch`` (from 0) and ``step``.
Row = dict[str, float]

_LARGEST = 1 << 28  # bytes of a file: an epoch has some hundreds
_MOST_EPOCHS = 1 << 32
_COUNTED = ("epoch", "step")  # integers
_NAME = re.compile(r"[A-Za-z][\w./ @+-]{0,199}")  # of possibly foreign names; no spreadsheet formulas

_PERCENT = re.compile(r"/(\w*top[15](_\w+)?|agreement)$")


def read_metrics(run: Path) -> "pd.DataFrame":
    """Returns the metrics logged at the end of epochs: one row per epoch (counted from 1), one column per metric.

    Args:
        run: a run directory with a ``metrics.csv``, which may be untrusted: values that are not numbers are dropped,
            and accuracies that are not percentages.

    Raises:
        ValueError: the file is not a table of epochs, or larger than any run's.
    """
    import pandas as pd  # not needed for training

    _check_size(run / METRICS)
    try:
        rows = pd.read_csv(run / METRICS)
    except pd.errors.EmptyDataError:
        rows = pd.DataFrame(columns=["epoch"])
    columns = [name for name in rows if name.startswith(("train/", "val/", "stats/"))]
    if "epoch" not in rows:
        raise ValueError(f"{run / METRICS} has no column epoch.")
    try:
        numbers = rows[["epoch", *columns]].apply(pd.to_numeric, errors="coerce")
    except OverflowError as error:  # of integers, not of fractions
        raise ValueError(f"{run / METRICS} has numbers of more digits than any run's.") from error
    for name in filter(_PERCENT.search, columns):
        numbers[name] = numbers[name].where(numbers[name].between(0, 100))
    epochs = numbers[numbers["epoch"].between(0, _MOST_EPOCHS)].groupby("epoch")[columns].last()
    epochs.index += 1
    return epochs.dropna(axis=1, how="all")


def read_rows(run: Path) -> list[Row]:
    """Returns the rows of a run's ``metrics.csv``; none if there is no such file.

    Raises:
        ValueError: the file is not a table, or larger than any run's.
    """
    if not (run / METRICS).is_file():
        return []
    _check_size(run / METRICS)
    with (run / METRICS).open(newline="") as file:
        try:
            return known_rows(list(csv.DictReader(file)))
        except csv.Error as error:  # such as an overlong cell
            raise ValueError(f"{run / METRICS} is not a table ({error}).") from error


def _check_size(path: Path) -> None:
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} has more than {_LARGEST:,} bytes, which no run's has.")


def known_rows(values: Any) -> list[Row]:
    """Keeps the valid parts of rows from a file or a checkpoint, possibly untrusted: numbers with plain names."""
    if not isinstance(values, list):
        return []
    rows = [_numbers(value) for value in values if isinstance(value, dict)]
    return [row for row in rows if "epoch" in row]


class RowWriter:
    """Writes a run's ``metrics.csv`` each time that a row is added; a killed process leaves the old file.

    A row that was not the last is formatted once: a run of many epochs would spend more and more time on it.

    Args:
        run: the run directory.
    """

    def __init__(self, run: Path) -> None:
        self._file = run / METRICS
        self._names: tuple[str, ...] = _COUNTED  # the columns
        self._lines: list[str] = []  # all rows but the last, formatted

    def write(self, rows: Sequence[Row]) -> None:
        """Writes the rows: those of the previous call, of which only the last may have changed, and later ones."""
        later = rows[len(self._lines) :]
        names = tuple(dict.fromkeys((*self._names, *(name for row in later for name in row))))
        if names != self._names:
            self._names, self._lines, later = names, [], rows
        lines = [*self._lines, *(_line([row.get(name, "") for name in names]) for row in later)]
        self._lines = lines[:-1]
        write_whole(self._file, "".join([_line(names), *lines]).encode())


def _line(cells: Sequence[object]) -> str:
    csv.writer(text := StringIO(), lineterminator="\n").writerow(cells)
    return text.getvalue()


def _numbers(values: Mapping[Any, Any]) -> Row:
    numbers: Row = {}
    for name, value in values.items():
        if isinstance(name, str) and _NAME.fullmatch(name) and value not in (None, ""):
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue
            counted = name in _COUNTED
            if not (counted and not math.isfinite(number)):
                numbers[name] = int(number) if counted else number
    return numbers
