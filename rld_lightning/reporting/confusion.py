"""Confusions of students: the whole matrix for few classes, the most frequent errors for many."""

from collections.abc import Sequence
from contextlib import suppress

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes

from rld_lightning.reporting.fonts import class_labels
from rld_lightning.reporting.labels import shortened
from rld_lightning.reporting.style import BLUE, SEQUENTIAL, FigureOfPanels, Panel, ink_on
from rld_lightning.reporting.tables import Section
from rld_lightning.runs.files import CONFUSION, text_of
from rld_lightning.runs.finished import Run

MAX_CLASSES = 20  # of a readable matrix
MAX_ERRORS = 15
_LARGEST = 20_000_000  # bytes of a file; ImageNet's has one to two million
_MOST_NAMES = 10_000  # classes in a file; the matrix has the square of it
_MOST_IMAGES = 1 << 40
_LONGEST_NAME = 18


def confusion_figure(section: Section, name: str) -> FigureOfPanels | None:
    """Plots the confusions of the best row whose runs have recorded them, summed over its seeds.

    Returns:
        None if no run has recorded them, or there are no errors.
    """
    for row, runs in section.rows["runs"].items():
        matrix, noted = _pooled(runs)
        if matrix is None:
            continue
        seeds = f", {noted} seeds together" if noted > 1 else ""
        where = f"on {section.split}{seeds}, after the last validation"
        if len(matrix) <= MAX_CLASSES:
            caption = (
                f"Predictions of {row} by class {where}: in percent of the class's images, so that rows sum to 100."
            )
            return FigureOfPanels(name, caption, (_matrix_panel(matrix, row),))
        errors = _errors(matrix)
        caption = f"The most frequent confusions of {row} {where}: in percent of the class's images."
        return FigureOfPanels(name, caption, (_errors_panel(errors, list(matrix), row),)) if len(errors) else None
    return None


def _pooled(runs: Sequence[Run]) -> tuple[pd.DataFrame | None, int]:
    """Image counts by class and prediction, summed over the runs that recorded them, and the number of these runs."""
    tables = []
    for run in runs:
        path = run.folder / CONFUSION
        if path.is_file() and path.stat().st_size < _LARGEST:
            with suppress(ValueError, KeyError, UnicodeDecodeError, OverflowError):  # damaged
                table = pd.read_csv(path, converters={"class": text_of, "predicted": text_of}, keep_default_na=False)
                table = table[["class", "predicted", "images"]].astype({"images": int})
                if len(table) and table["images"].between(0, _MOST_IMAGES).all():
                    tables.append(table)
    if not tables:
        return None, 0
    pooled = pd.concat(tables)
    names = list(dict.fromkeys([*pooled["class"], *pooled["predicted"]]))
    if len(names) > _MOST_NAMES:
        return None, 0
    counts = pooled.groupby(["class", "predicted"], sort=False)["images"].sum().unstack(fill_value=0)
    return counts.reindex(index=names, columns=names, fill_value=0), len(tables)


def _shares(matrix: pd.DataFrame) -> pd.DataFrame:
    totals = matrix.sum(axis=1)
    return 100 * matrix.div(totals.where(totals > 0), axis=0)


def _errors(matrix: pd.DataFrame) -> pd.Series:
    """The percentages of the most frequent confusions, by class and prediction, largest first."""
    shares = _shares(matrix).rename_axis(index="class", columns="predicted").stack()
    wrong = shares[shares.index.get_level_values(0) != shares.index.get_level_values(1)]
    return wrong[wrong > 0].sort_values(ascending=False, kind="stable")[:MAX_ERRORS]


def _matrix_panel(matrix: pd.DataFrame, row: str) -> Panel:
    shares = _shares(matrix)

    def draw(axes: Axes) -> None:
        colours = colormaps[SEQUENTIAL]
        axes.pcolormesh(shares.fillna(0).to_numpy(), cmap=colours, vmin=0, vmax=100)
        for y, line in enumerate(shares.to_numpy()):
            for x, value in enumerate(line):
                if value >= 0.5:
                    axes.text(
                        x + 0.5, y + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=8,
                        color=ink_on(colours(value / 100)),
                    )  # fmt: skip
        ticks = [place + 0.5 for place in range(len(shares))]
        names = [shortened(name, _LONGEST_NAME) for name in class_labels(list(shares))]
        axes.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(ticks, names)
        axes.set(xlabel="predicted", ylabel="class")
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    side = 1.6 + 0.34 * len(shares)
    worst = ", ".join(f"{a} taken for {b} {share:.1f} %" for (a, b), share in _errors(matrix)[:3].items())
    return Panel("", f"Confusion matrix of {row}. Most frequent: {worst or 'no error'}.", draw, (side + 0.4, side))


def _errors_panel(errors: pd.Series, classes: list[str], row: str) -> Panel:
    def draw(axes: Axes) -> None:
        shown = errors[::-1]
        labels = dict(zip(classes, class_labels(classes), strict=True))
        names = [" taken for ".join(shortened(labels[name], _LONGEST_NAME) for name in pair) for pair in shown.index]
        bars = axes.barh(range(len(shown)), shown.to_numpy(), color=BLUE, height=0.6)
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.set_yticks(range(len(shown)), names)
        axes.set(xlabel="share of the class's images (%)", xlim=(0, 1.15 * shown.max()))
        axes.grid(axis="x")

    worst = ", ".join(f"{a} taken for {b} {share:.1f} %" for (a, b), share in errors[:3].items())
    return Panel("", f"Most frequent confusions of {row}: {worst}.", draw, (5.6, 1.0 + 0.27 * len(errors)))
