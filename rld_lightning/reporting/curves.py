"""Learning curves of a run as one picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # runs have no display

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rld_lightning.reporting.style import styled
from rld_lightning.runs.metrics import read_metrics

# What is logged under train/ beside the terms of the loss.
NO_TERMS = {
    f"train/{name}"
    for name in (
        "loss",
        "top1",
        "top5",
        "teacher_top1",
        "agreement",
        "top1_teacher_wrong",
        "images_per_s",
        "grad_norm",
    )
}


@styled
def plot_curves(run: Path, title: str) -> Path:
    """Draws accuracy, loss terms and their shares, teacher and student, gradient norm and learning rate.

    Args:
        run: a run folder with a ``metrics.csv``.
        title: heading of the picture.

    Returns:
        the picture's path, ``curves.png``.
    """
    metrics = read_metrics(run)
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    figure.suptitle(title)
    accuracy, loss, shares, teacher, gradient, rate = figure.subplots(2, 3).flat
    _lines(accuracy, metrics, {"train/top1": "train top-1", "val/top1": "val top-1", "val/top5": "val top-5"})
    accuracy.set(title="Student accuracy", ylabel="%")
    terms = {n: n.removeprefix("train/") for n in metrics if n.startswith("train/") and n not in NO_TERMS}
    _lines(loss, metrics, {"train/loss": "sum", **terms, "val/ce": "val ce"})
    loss.set(title="Loss terms (weighted) and validation cross-entropy", ylabel="nats")
    share_of = {f"stats/{name}_share": name for name in terms.values()}
    _lines(shares, metrics, share_of)
    shares.set(title="Share of each term in the loss", ylabel="%")
    _lines(
        teacher,
        metrics,
        {
            "val/teacher_top1": "teacher top-1, val",
            "val/agreement": "student agrees with teacher, val",
            "val/top1_teacher_wrong": "student right where teacher is wrong, val",
            **{
                n: f"{n.removeprefix('stats/').replace('_', ' ')}, train"
                for n in metrics
                if n.startswith("stats/") and n not in share_of
            },
        },
    )
    teacher.set(title="Teacher, and what the loss tells about itself", ylabel="%")
    _lines(gradient, metrics, {"train/grad_norm": "mean over the epoch"})
    gradient.set(title="Gradient norm, before clipping")
    for axes in (accuracy, loss, shares, teacher, gradient):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.has_data():
            axes.legend()
    for name, values in _learning_rates(run).items():
        marker = "." if len(values) < 40 else None
        rate.plot(values.index, values, label=name, drawstyle="steps-post", marker=marker)
    rate.set(title="Learning rate", xlabel="step")
    absent = {
        shares: "the loss has one term",
        teacher: "no teacher in this run",
        gradient: "not logged in this run",
        rate: "too few steps to be logged",
    }
    for axes, nothing in absent.items():
        if not axes.has_data():
            axes.text(0.5, 0.5, nothing, ha="center", va="center", transform=axes.transAxes)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    path = run / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def _learning_rates(run: Path) -> pd.DataFrame:
    """Learning rate of each parameter group by training step; its monitor writes rows without an epoch."""
    rows = pd.read_csv(run / "metrics.csv").set_index("step")
    return rows[[name for name in rows if name.startswith("lr")]].dropna(how="all")


def _lines(axes: Axes, metrics: pd.DataFrame, labels: dict[str, str]) -> None:
    for name, label in labels.items():
        if name in metrics:
            values = metrics[name].dropna()
            axes.plot(values.index, values, label=label, marker="." if len(values) < 40 else None)
