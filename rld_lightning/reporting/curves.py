"""The learning curves of a run as one picture."""

from contextlib import suppress
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

_MIN_IMAGES = 20  # images, too few for a meaningful percentage


@styled
def plot_curves(run: Path, title: str, summary: Summary | None = None) -> Path:
    """Draws a run's accuracy, loss terms and their shares, teacher statistics, gradient norm and learning rate.

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
    # Title, unit, labels by logged name, and the text of an empty panel.
    panels = [
        ("Student accuracy", "%", {"train/top1": "train top-1", "val/top1": "val top-1", "val/top5": "val top-5"}, ""),
        (
            *("Loss terms (weighted) and validation cross-entropy", "nats"),
            *({"train/loss": "sum", **terms, "val/ce": "val ce"}, ""),
        ),
        ("Share of each term in the loss", "%", shares, "the loss has one term"),
        ("Teacher and statistics of the loss", "%", on_validation | on_training, "no teacher in this run"),
        ("Gradient norm, before clipping", "", {"train/grad_norm": "mean over the epoch"}, "not logged in this run"),
        ("Learning rate", "", {name: name for name in rates}, "too few steps to be logged"),
    ]
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    figure.suptitle(f"{title}; val: {summary.validation_images}\n" if summary else f"{title}\n")
    for axes, (heading, unit, labels, nothing) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        by_step = heading == "Learning rate"
        table = rates if by_step else metrics
        for name in (name for name in labels if name in table):
            values = table[name].dropna()
            marker = "." if len(values) < 40 else None
            drawstyle = rate_style if by_step else "default"
            axes.plot(values.index, values, label=labels[name], marker=marker, drawstyle=drawstyle)
        axes.set(title=heading, ylabel=unit, xlabel="step" if by_step else "epoch")
        if not by_step:
            tick_whole_epochs(axes, metrics.index)
        if not axes.has_data():
            axes.text(0.5, 0.5, nothing, ha="center", va="center", transform=axes.transAxes)
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
