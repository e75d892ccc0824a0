"""Tables and figures from finished runs."""

from rld_lightning.reporting.curves import plot_curves, read_metrics

__all__ = ["plot_curves", "read_metrics"]
