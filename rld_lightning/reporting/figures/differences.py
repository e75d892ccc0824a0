"""Heat maps of the logit differences between student and teacher by class, for DKD and RLD.

The heat map of DKD's public code (mdistiller, ``tools/visualizations/correlation.ipynb``), which is also in the RLD
paper. There RLD's students differ *more* from the teacher than DKD's, and are better: they do not copy its mistakes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from rld_lightning.losses.numerics import standardize
from rld_lightning.reporting.figures import register_figure
from rld_lightning.reporting.fonts import class_labels
from rld_lightning.reporting.logits import LogitSource
from rld_lightning.reporting.style import DIVERGING, PALE, SEQUENTIAL, save_figure, styled
from rld_lightning.reporting.tables import Section, choose_pair

MOST_NAMES = 20


@dataclass(frozen=True)
class DifferenceMap:
    """The logit differences between one method's students and their teacher."""

    name: str  # the method
    n: int  # number of seeds averaged in `cells`
    cells: Tensor  # `(C, C)`; row: true class, column: logit; NaN on the diagonal
    class_names: list[str]  # the C names

    @property
    def mean(self) -> float:
        """Mean of the cells without the diagonal."""
        return float(self.cells.nanmean())


def _options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--methods", nargs="+", default=["dkd", "rld"], help="losses, in order (dkd rld)")
    command.add_argument("--standardized", action="store_true", help="z-score each sample's logits first")
    command.add_argument("--top", type=float, help="upper end of the colour scale, to compare figures")


@register_figure("differences", "students and their teacher, heat maps", _options)
def write_differences(
    out: Path,
    runs: pd.DataFrame,
    *,
    reader: LogitSource,
    pair: str | None = None,
    methods: Sequence[str] = ("dkd", "rld"),
    standardized: bool = False,
    top: float | None = None,
) -> list[Path]:
    """Writes heat maps of the differences between students and teacher.

    Args:
        standardized: z-score each sample's logits first.
        top: upper end of the colour scale, to compare figures; None for :func:`draw_differences`'s default.
    """
    section = choose_pair(runs, pair)
    maps = difference_maps(section, methods, reader, standardized=standardized)
    what = "standardized logits" if standardized else "logits"
    title = f"Student and teacher, mean {what} by class: {section.title}, {section.dataset}, {section.split}"
    return save_figure(draw_differences(maps, title, top=top), out, "differences")


def class_means(logits: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Mean logits by class: ``(N, C)`` and ``(N,)`` to ``(C, C)``; NaN for a class without samples."""
    sums = torch.zeros(num_classes, logits.shape[1], dtype=torch.float64).index_add_(0, label, logits.double())
    return sums / label.bincount(minlength=num_classes)[:, None]


def logit_differences(student: Tensor, teacher: Tensor, label: Tensor, *, standardized: bool = False) -> Tensor:
    """Absolute difference of the student's and the teacher's mean logits by true class, without the diagonal.

    Args:
        student: logits ``(N, C)``.
        teacher: logits ``(N, C)``.
        label: ``(N,)``.
        standardized: z-score each sample's logits first (LSKD). Distillation by softmax never determines the offset of
            a sample's logits, and some methods not their scale; this removes both.

    Returns:
        ``(C, C)``; row: true class, column: logit. The diagonal, which the published code sets to 0, is NaN here, so
        that means ignore it.
    """
    if standardized:
        student, teacher = standardize(student), standardize(teacher)
    means = [class_means(logits, label, student.shape[1]) for logits in (student, teacher)]
    return (means[0] - means[1]).abs().fill_diagonal_(torch.nan)


def difference_maps(
    section: Section, methods: Sequence[str], reader: LogitSource, *, standardized: bool = False
) -> list[DifferenceMap]:
    """The maps of some methods of a pair, each averaged over seeds.

    Raises:
        ValueError: a method has no run.
    """
    distilled = section.rows[section.rows["distilled"]]
    known = sorted(set(distilled["method"]))
    if missing := [method for method in methods if method not in known]:
        raise ValueError(
            f"there is no finished run of {section.title} with loss={missing[0]}; choose among {', '.join(known)} "
            "with --methods."
        )
    maps = []
    for name in (name for method in methods for name in distilled.index[distilled["method"] == method]):
        read = [reader.read(run) for run in distilled.at[name, "runs"]]
        cells = [logit_differences(one.student, one.teacher, one.label, standardized=standardized) for one in read]
        maps.append(DifferenceMap(name, len(read), torch.stack(cells).mean(0), read[0].class_names))
    return maps


@styled
def draw_differences(maps: list[DifferenceMap], title: str, *, top: float | None = None) -> Figure:
    """Draws maps side by side with one colour scale; if there are two, also the second minus the first.

    Args:
        top: upper end of the scale, to compare figures; None for the largest 99.5 % quantile of the maps.
    """
    count = len(maps) + (len(maps) == 2)
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(3.4 * columns, 4.5) + 0.6, 3.4 * rows + 0.9), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in panels[count:]:
        axes.remove()
    largest = max(float(one.cells.nanquantile(0.995)) for one in maps) if top is None else top
    for axes, one in zip(panels, maps, strict=False):
        shown = _draw_map(axes, one.cells, one.class_names, cmap=SEQUENTIAL, vmin=0, vmax=largest)
        axes.set_title(f"{one.name}\nmean {one.mean:.3f} (n = {one.n})")
    figure.colorbar(
        shown,
        ax=list(panels[: len(maps)]),
        location="bottom",
        aspect=50,
        extend="max",
        label="|student \u2212 teacher|, logits",
    )
    if len(maps) == 2:
        first, second = maps
        change = second.cells - first.cells
        end = float(change.abs().nanquantile(0.995)) or 1.0
        shown = _draw_map(panels[2], change, first.class_names, cmap=DIVERGING, vmin=-end, vmax=end)
        mean = f"{float(change.nanmean()):+.3f}".replace("-", "\u2212")
        panels[2].set_title(f"{second.name} \u2212 {first.name}\nmean {mean}")
        figure.colorbar(
            shown, ax=panels[2], location="bottom", aspect=25, extend="both", label="orange: the second is further away"
        )
    return figure


def _draw_map(axes: Axes, cells: Tensor, class_names: list[str], **scale: Any) -> AxesImage:
    axes.set_facecolor(PALE)
    place = axes.get_subplotspec()
    leftmost = place is not None and place.is_first_col()
    image = axes.imshow(cells.numpy(), interpolation="nearest", **scale)
    axes.set_xlabel("class of the logit")
    if leftmost:
        axes.set_ylabel("true class")
    if len(class_names) <= MOST_NAMES:
        class_names, places = class_labels(class_names), range(len(class_names))
        axes.set_xticks(places, class_names, rotation=90 if max(map(len, class_names)) > 2 else 0)
        axes.set_yticks(places, class_names if leftmost else [])
    for side in axes.spines.values():
        side.set_visible(False)
    return image
