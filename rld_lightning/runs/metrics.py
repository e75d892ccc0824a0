"""The values that a run logs: read, kept when it goes on, and joined to the whole story."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from rld_lightning.distributed import rank_zero_only
from rld_lightning.runs.files import EARLIER_METRICS, METRICS, write_csv

if TYPE_CHECKING:
    import pandas as pd


def read_metrics(run: Path) -> "pd.DataFrame":
    """The values logged at the end of epochs, one row an epoch (counted from 1), one column a metric.

    Args:
        run: a run folder with a ``metrics.csv``.
    """
    import pandas as pd  # runs that only train do not need it

    rows = pd.read_csv(run / METRICS)
    columns = [name for name in rows if name.startswith(("train/", "val/", "stats/"))]
    epochs = rows.groupby("epoch")[columns].last()
    epochs.index += 1
    return epochs.dropna(axis=1, how="all")


@rank_zero_only
def keep_metrics(run: Path, resume: str | None) -> None:
    """Before a run goes on in its own folder: saves what was logged there from the logger, which begins a new file."""
    if not _in_place(run, resume) or not (run / METRICS).exists():
        return
    join_metrics(run, resume)  # of an attempt that was killed
    (run / METRICS).rename(run / EARLIER_METRICS)


@rank_zero_only
def join_metrics(run: Path, resume: str | None) -> None:
    """Puts what was logged before the checkpoint in front, so that a resumed run tells the whole story."""
    if resume is None:
        return
    before = run / EARLIER_METRICS if _in_place(run, resume) else Path(resume).parent / METRICS
    if not before.exists():
        return
    if (run / METRICS).exists():
        earlier, now = _rows(before), _rows(run / METRICS)
        start = min((float(row["step"]) for row in now), default=float("inf"))
        rows = [row for row in earlier if float(row["step"]) < start] + now
        names = dict.fromkeys(name for row in rows for name in row)
        write_csv(run / METRICS, {name: [row.get(name, "") for row in rows] for name in names})
        if _in_place(run, resume):
            before.unlink()
    elif _in_place(run, resume):
        before.rename(run / METRICS)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _in_place(run: Path, resume: str | None) -> bool:
    return resume is not None and Path(resume).absolute().parent == run.absolute()
