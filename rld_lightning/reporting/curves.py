"""The learning curves of a run as one picture."""

from contextlib import suppress
from math import ceil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # runs have no display

import pandas as pd
from matplotlib.figure import Figure

from rld_lightning.reporting.style import styled, tick_whole_epochs, write_figure
from rld_lightning.runs.files import CURVES, METRICS, read_config
from rld_lightning.runs.metrics_csv import read_metrics
from rld_lightning.runs.summary import Summary

# Names logged under train/ that are not terms of the loss.
NOT_LOSS_TERMS = {
    *("train/loss", "train/top1", "train/top5", "train/teacher_top1", "train/agreement", "train/top1_teacher_wrong"),
    *("train/images_per_s", "train/grad_norm"),
}

_RATE = "Learning rate"
_MIN_IMAGES = 20  # images, too few for a meaningful percentage


@styled
def plot_curves(run: Path, title: str, summary: Summary | None = None) -> Path:
    """Draws a run's accuracy, loss terms and their shares, teacher statistics, gradient norm and learning rate.

    There is a panel for each of these that the run has logged: a loss of one term has no shares.
    A partly trained epoch is drawn at its fraction: 60 of 782 steps at 0.08. The accuracy on images that the teacher
    gets wrong is omitted if these are fewer than 20 validation images.

    Args:
        summary: the run's summary, for the number of trained steps; without it all epochs count as complete.

    Returns:
        the picture's path, ``curves.png``.
    """
    metrics = _by_epochs_trained(run, summary)
    rates, rate_style = _learning_rates(run)
    terms = {
        name: name.removeprefix("train/")
        for name in metrics
        if name.startswith("train/") and name not in NOT_LOSS_TERMS
    }
    shares = {f"stats/{term}_share": term for term in terms.values()}
    statistics = [name for name in metrics if name.startswith("stats/") and name not in shares]
    on_validation = {
        "val/teacher_top1": "teacher top-1, val",
        "val/agreement": "student agrees with teacher, val",
        "val/top1_teacher_wrong": "student right where teacher is wrong, val",
    }
    # Of images that the teacher gets wrong.
    if summary is not None and summary.images * (1 - (summary.teacher_top1 or 0) / 100) < _MIN_IMAGES:
        del on_validation["val/top1_teacher_wrong"]
    on_training = {name: f"{name.removeprefix('stats/').replace('_', ' ')}, train" for name in statistics}
    losses = terms if len(terms) == 1 else {"train/loss": "sum", **terms}
    # Title, unit, labels by logged name.
    panels = [
        ("Student accuracy", "%", {"train/top1": "train top-1", "val/top1": "val top-1", "val/top5": "val top-5"}),
        ("Loss terms (weighted) and validation cross-entropy", "nats", {**losses, "val/ce": "val ce"}),
        ("Share of each term in the loss", "%", shares),
        ("Teacher and statistics of the loss", "%", on_validation | on_training),
        ("Gradient norm, before clipping", "", {"train/grad_norm": "mean over the epoch"}),
        (_RATE, "", {name: name for name in rates}),
    ]
    tables = {title: rates if title == _RATE else metrics for title, *_ in panels}
    drawn = [panel for panel in panels if tables[panel[0]].filter(panel[2]).notna().any(axis=None)] or panels[:1]
    rows = min(2, len(drawn))
    columns = ceil(len(drawn) / rows)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    figure.suptitle(f"{title}; val: {summary.validation_images}\n" if summary else f"{title}\n")
    for number, (heading, unit, labels) in enumerate(drawn, 1):
        axes, by_step, table = figure.add_subplot(rows, columns, number), heading == _RATE, tables[heading]
        for name in (name for name in labels if name in table):
            values = table[name].dropna()
            marker = "." if len(values) < 40 else None
            drawstyle = rate_style if by_step else "default"
            axes.plot(values.index, values, label=labels[name], marker=marker, drawstyle=drawstyle)
        axes.set(title=heading, ylabel=unit, xlabel="step" if by_step else "epoch")
        if not by_step:
            tick_whole_epochs(axes, metrics.index)
        if not axes.has_data():
            axes.text(0.5, 0.5, "nothing was logged", ha="center", va="center", transform=axes.transAxes)
        elif len(axes.lines) > 4:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize="small", frameon=False)
        elif not by_step:
            axes.legend(frameon=True, framealpha=0.8, edgecolor="none")  # may cover a line
        axes.grid(alpha=0.3)
    write_figure(figure, run / CURVES, dpi=120)
    return run / CURVES


def _by_epochs_trained(run: Path, summary: Summary | None) -> pd.DataFrame:
    """:func:`read_metrics` by the (fractional) number of trained epochs, if the steps of an epoch are known."""
    metrics = read_metrics(run)
    with suppress(FileNotFoundError, KeyError, TypeError, ValueError):  # incomplete config
        epochs = int(read_config(run)["trainer"]["max_epochs"])
        if summary is None or summary.scheduled_steps is None or metrics.empty:
            return metrics
        rows = pd.read_csv(run / METRICS).dropna(subset=list(metrics), how="all")
        # Steps are counted from 0, except in a validation after the last one.
        steps = (rows.groupby("epoch")["step"].max() + 1).clip(upper=summary.steps)
        trained = steps * epochs / summary.scheduled_steps
        return metrics.groupby(trained.to_numpy()).last()
    return metrics


def _learning_rates(run: Path) -> tuple[pd.DataFrame, str]:
    """The learning rates by training step, and matplotlib's ``drawstyle`` for them.

    There is one per epoch, that of its last step (constant over the epoch, unless the schedule is by step); with
    Lightning's ``LearningRateMonitor``, one per logged step and optimizer.
    """
    try:
        rows = pd.read_csv(run / METRICS).set_index("step")
    except pd.errors.EmptyDataError:
        return pd.DataFrame(), "default"
    if names := [name for name in rows if name.startswith("lr-")]:
        return rows[names].dropna(how="all"), "steps-post"
    rates = rows[[name for name in rows if name == "lr"]].dropna(how="all")
    with suppress(FileNotFoundError, KeyError, TypeError, ValueError):  # incomplete config
        if read_config(run)["recipe"]["scheduler_interval"] == "epoch" and len(rates):
            return pd.concat([rates.iloc[:1].set_axis([0]), rates]), "steps-pre"
    return rates, "default"
