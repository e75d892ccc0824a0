"""What a method gains over others, by how accurate the teacher is on the images that it teaches with.

In the RLD paper the gain over DKD grows as the teacher's training accuracy falls: the more mistakes there are, the more
there is to refine.
"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean, stdev

import pandas as pd
from matplotlib.figure import Figure

from rld_lightning.reporting.runs import Run
from rld_lightning.reporting.style import BLACK, PALETTE, styled
from rld_lightning.reporting.tables import BEST, LAST, Row, sections

TEACHER_TOP1 = "train/teacher_top1"
REFERENCES = ("ce", "kd", "dkd")


def gains(
    runs: Sequence[Run], method: str = "rld", references: Sequence[str] = REFERENCES, *, best: bool = False
) -> pd.DataFrame:
    """One line a pair and reference: how much the method is ahead, seed by seed.

    Only runs with the same recipe are compared, and only seeds that both were run with.

    Args:
        runs: finished runs of several pairs or teachers.
        method: an option of the loss group.
        references: the options that it is compared to; those that are not there are left out.
        best: compare best epochs, not last ones.

    Returns:
        ``pair``, ``reference``, ``teacher_top1`` (on augmented training images, mean of the epochs), ``gain`` (percent
        points), ``std`` of the differences (n - 1; NaN of one), ``n``.

    Raises:
        ValueError: there is nothing to compare.
    """
    lines = []
    found, _ = sections(runs)
    metric = BEST if best else LAST
    for section in found:
        for row in section.rows:
            if row.method != method or row.teacher is None:
                continue
            for reference in references:
                base = section.baseline(row, reference)
                ahead = _differences(row, base, metric) if base else []
                if ahead:
                    lines.append(
                        {
                            "pair": f"{section.title}, {section.dataset}" + (f" ({row.label})" if row.label else ""),
                            "reference": reference,
                            "teacher_top1": _teacher_top1(row),
                            "gain": mean(ahead),
                            "std": stdev(ahead) if len(ahead) > 1 else float("nan"),
                            "n": len(ahead),
                        }
                    )
    if not lines:
        raise ValueError(
            f"no pair has finished runs of loss={method} and of {' or '.join(references)} with the same recipe and "
            "seed; run both, or choose others with --method and --over."
        )
    return pd.DataFrame(sorted(lines, key=lambda line: list(references).index(line["reference"])))


def _differences(row: Row, base: Row, metric: str) -> list[float]:
    ours, theirs = row.values(metric), base.values(metric)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def _teacher_top1(row: Row) -> float:
    for run in row.runs:
        if TEACHER_TOP1 not in run.metrics:
            raise ValueError(f"{run.folder}/metrics.csv has no {TEACHER_TOP1}; train it with callbacks.teacher on.")
    return mean(float(run.metrics[TEACHER_TOP1].mean()) for run in row.runs)


@styled
def draw_gain(table: pd.DataFrame, method: str) -> Figure:
    """Draws :func:`gains`, a point with its deviation for each pair and reference."""
    pairs = list(table.sort_values("teacher_top1")["pair"].drop_duplicates())
    figure = Figure(figsize=(6.4, 4.4 + 0.17 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=BLACK, linewidth=0.8)
    spread = table["teacher_top1"].max() - table["teacher_top1"].min()
    step = 0.012 * (spread or 1.0)
    references = list(table["reference"].unique())
    for place, reference in enumerate(references):
        points = table[table["reference"] == reference]
        counts = ", ".join(map(str, sorted(set(points["n"]))))
        axes.errorbar(
            points["teacher_top1"] + step * (place - (len(references) - 1) / 2),  # beside each other, to be told apart
            points["gain"],
            yerr=points["std"],
            fmt="os^Dv"[place % 5],
            capsize=3,
            color=PALETTE[place % len(PALETTE)],
            label=f"over {reference} (n = {counts})",
        )
    axes.margins(x=0.12)
    if not spread:
        axes.set_xlim(table["teacher_top1"].iloc[0] - 1, table["teacher_top1"].iloc[0] + 1)
    axes.margins(y=0.2)
    numbers = defaultdict(list)  # of pairs whose teachers are as good as the same, over the highest of their points
    for number, pair in enumerate(pairs, 1):
        numbers[round((table.loc[table["pair"] == pair, "teacher_top1"].iloc[0]) / (4 * step))].append(number)
    for together in numbers.values():
        points = table[table["pair"].isin([pairs[number - 1] for number in together])]
        where = (points["teacher_top1"].mean(), (points["gain"] + points["std"].fillna(0)).max())
        told = ", ".join(map(str, together))
        axes.annotate(told, where, (0, 6), textcoords="offset points", ha="center", fontweight="bold")
    axes.set(
        xlabel="teacher's top-1 on the augmented training images, %",
        ylabel=f"gain of {method}, percent points of top-1",
        title=f"What {method} gains, by its teacher's training accuracy",
    )
    axes.grid()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
    key = "\n".join(f"{number}  {pair}" for number, pair in enumerate(pairs, 1))
    figure.supxlabel(f"{key}\nBars: standard deviation over seeds.", fontsize=8, x=0.02, ha="left")
    return figure
