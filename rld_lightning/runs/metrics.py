"""The values that a run logs: read, kept when it goes on, and joined to the whole story."""

from pathlib import Path

import pandas as pd

from rld_lightning.distributed import rank_zero_only
from rld_lightning.runs.files import EARLIER_METRICS, METRICS


def read_metrics(run: Path) -> pd.DataFrame:
    """The values logged at the end of epochs, one row an epoch (counted from 1), one column a metric.

    Args:
        run: a run folder with a ``metrics.csv``.
    """
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
        now = pd.read_csv(run / METRICS)
        earlier = pd.read_csv(before)
        pd.concat([earlier[earlier["step"] < now["step"].min()], now]).to_csv(run / METRICS, index=False)
        if _in_place(run, resume):
            before.unlink()
    elif _in_place(run, resume):
        before.rename(run / METRICS)


def _in_place(run: Path, resume: str | None) -> bool:
    return resume is not None and Path(resume).absolute().parent == run.absolute()
