"""Tables and figures from finished runs."""

from rld_lightning.reporting.curves import plot_curves
from rld_lightning.reporting.runs import Run, Summary, find_all, find_runs, read_metrics, read_run

__all__ = ["Run", "Summary", "find_all", "find_runs", "plot_curves", "read_metrics", "read_run"]
