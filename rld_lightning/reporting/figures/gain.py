"""The gain of a method over others, by the teacher's accuracy on the training images.

In the RLD paper the gain over DKD grows as the teacher's training accuracy falls: more mistakes leave more to refine.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import pandas as pd
from matplotlib.figure import Figure

from rld_lightning.console import print_line
from rld_lightning.reporting.figures import register_figure
from rld_lightning.reporting.frame import BEST, LAST, write_csv
from rld_lightning.reporting.style import BLACK, GREY, PALETTE, save_figure, styled
from rld_lightning.reporting.tables import sections
from rld_lightning.runs.files import METRICS

TEACHER_TOP1 = "train/teacher_top1"
REFERENCES = ("ce", "kd", "dkd")


def _options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", default="rld")
    command.add_argument("--over", nargs="+", default=list(REFERENCES), help="what it is compared to (ce kd dkd)")
    command.add_argument("--best", action="store_true", help="compare best epochs, not last ones")


@register_figure("gain", "gain by the teacher's training accuracy", _options)
def write_gain(
    out: Path, runs: pd.DataFrame, *, method: str = "rld", over: Sequence[str] = REFERENCES, best: bool = False
) -> list[Path]:
    """Writes the figure of a method's gain by its teacher's training accuracy, and the numbers as CSV."""
    table, left_out = gains(runs, method, over, best=best)
    for reason in left_out:
        print_line("left out", f"gain: {reason}")
    files = save_figure(draw_gain(table, method), out, "gain")
    return [*files, write_csv(table.round(4), out / "gain.csv")]


def gains(
    runs: pd.DataFrame, method: str = "rld", references: Sequence[str] = REFERENCES, *, best: bool = False
) -> tuple[pd.DataFrame, list[str]]:
    """The method's gain for each pair and reference, seed by seed.

    Only runs with the same recipe are compared, and only seeds that both were run with.

    Args:
        references: the options to compare with; those without runs are skipped.

    Returns:
        the lines: ``pair``, ``reference``, ``teacher_top1`` (on augmented training images, mean of the epochs),
        ``gain`` (mean over the seeds in common, percent points), ``low`` and ``high`` (ends of its 95 % confidence
        interval; NaN if not tested), ``n``; and a sentence for each row left out.

    Raises:
        ValueError: there is nothing to compare.
    """
    lines, left_out = [], []
    for section in sections(runs)[0]:
        rows = section.rows
        for name, row in rows[rows["distilled"] & (rows["method"] == method)].iterrows():
            all_gains = {reference: section.gain(name, reference, BEST if best else LAST) for reference in references}
            comparisons = {reference: gain for reference, gain in all_gains.items() if gain and gain.n}
            if comparisons and (unknown := [run for run in row["runs"] if TEACHER_TOP1 not in run.metrics]):
                left_out.append(
                    f"{section.title}, {name}: {unknown[0].folder / METRICS} has no {TEACHER_TOP1}; train it "
                    "with callbacks.teacher on."
                )
                continue
            pair = f"{section.title}, {section.dataset}" + ("" if section.on_test else f", {section.split}")
            pair += f" ({row['label']})" if row["label"] else ""
            for reference, gain in comparisons.items():
                teacher_top1 = mean(float(run.metrics[TEACHER_TOP1].mean()) for run in row["runs"])
                lines.append((pair, reference, teacher_top1, gain.mean, gain.low, gain.high, gain.n))
    if not lines and left_out:
        raise ValueError(f"no pair can be drawn. {left_out[0]}")
    if not lines:
        raise ValueError(
            f"no pair has finished runs of loss={method} and of {' or '.join(references)} with the same recipe and "
            "seed; run both, or choose others with --method and --over."
        )
    lines.sort(key=lambda line: list(references).index(line[1]))
    table = pd.DataFrame(lines, columns=["pair", "reference", "teacher_top1", "gain", "low", "high", "n"])
    return table.astype({"low": float, "high": float}), left_out


@styled
def draw_gain(table: pd.DataFrame, method: str) -> Figure:
    """Draws :func:`gains`, a point with its confidence interval for each pair and reference.

    Points with almost equal teacher accuracy are drawn side by side.
    """
    table = table.sort_values(["teacher_top1", "pair"], kind="stable", ignore_index=True)
    table["x"] = _spread_apart(table["teacher_top1"])
    pairs = list(table["pair"].drop_duplicates())
    figure = Figure(figsize=(6.4, 4.4 + 0.17 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=BLACK, linewidth=0.8)
    moved = bool((table["x"] != table["teacher_top1"]).any())
    for true_place in table["teacher_top1"].unique() if moved else ():
        axes.axvline(true_place, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    for place, (reference, points) in enumerate(table.groupby("reference", sort=False)):
        counts = ", ".join(map(str, sorted(set(points["n"]))))
        axes.errorbar(
            points["x"],
            points["gain"],
            yerr=(points["high"] - points["gain"]) if points["high"].notna().any() else None,
            fmt="os^Dv"[place % 5],
            capsize=3,
            color=PALETTE[place % len(PALETTE)],
            label=f"over {reference} (n = {counts})",
        )
    for number, pair in enumerate(pairs, 1):
        points = table[table["pair"] == pair]
        where = (points["x"].mean(), points["high"].fillna(points["gain"]).max())
        box = {"facecolor": "white", "linewidth": 0, "pad": 0.5}  # over the dotted line
        axes.annotate(str(number), where, (0, 7), textcoords="offset points", ha="center", fontweight="bold", bbox=box)
    axes.margins(x=0.12, y=0.2)
    if table["teacher_top1"].nunique() == 1:
        axes.set_xlim(table["teacher_top1"].iloc[0] - 1, table["teacher_top1"].iloc[0] + 1)
    axes.set(
        xlabel="teacher's top-1 on the augmented training images, %",
        ylabel=f"gain of {method}, percentage points of top-1",
        title=f"What {method} gains, by its teacher's training accuracy",
    )
    axes.grid(axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
    notes = [f"{number}  {pair}" for number, pair in enumerate(pairs, 1)]
    if table["low"].notna().any():
        notes.append("Bars: 95 % confidence interval of the mean over seeds, from three seeds on.")
    if moved:
        notes.append("Points of one teacher are set beside each other; dotted lines: its accuracy.")
    figure.supxlabel("\n".join(notes), fontsize=8, x=0.02, ha="left")
    return figure


def _spread_apart(places: pd.Series) -> pd.Series:
    """Spreads each group of almost equal values, given in ascending order, around their own values."""
    width = (places.max() - places.min()) or 2.0
    gaps = places.diff()
    group = (gaps > 0.03 * width).cumsum()
    sizes = places.groupby(group).transform("size")
    between = gaps[gaps > 0.03 * width].min()  # NaN if there is only one group
    step = min(0.018 * width, 0.7 * (width if pd.isna(between) else between) / sizes.max())
    return places + step * (places.groupby(group).cumcount() - (sizes - 1) / 2)
