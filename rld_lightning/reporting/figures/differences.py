"""How far students are from their teacher, class by class: DKD beside RLD.

The heat map of DKD's public code (mdistiller, ``tools/visualizations/correlation.ipynb``), which the RLD paper draws
too. There RLD's students are *further* from the teacher than DKD's, and better: they do not copy its mistakes.
"""

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from rld_lightning.losses.numerics import standardize
from rld_lightning.reporting.figures.logits import LogitReader
from rld_lightning.reporting.style import DIVERGING, PALE, SEQUENTIAL, styled
from rld_lightning.reporting.tables import Row, Section

MOST_NAMES = 20


@dataclass(frozen=True)
class DifferenceMap:
    """How far one method's students are from their teacher.

    Attributes:
        name: the method.
        n: over how many seeds ``cells`` is the mean.
        cells: ``(C, C)``; row: true class, column: logit; NaN on the diagonal.
        class_names: the C names.
    """

    name: str
    n: int
    cells: Tensor
    class_names: list[str]

    @property
    def mean(self) -> float:
        """Mean of all cells but the diagonal."""
        return float(self.cells.nanmean())


def class_means(logits: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Mean logits of the samples of each class: ``(N, C)`` and ``(N,)`` to ``(C, C)``; NaN for a class without any."""
    sums = torch.zeros(num_classes, logits.shape[1], dtype=torch.float64).index_add_(0, label, logits.double())
    return sums / label.bincount(minlength=num_classes)[:, None]


def logit_differences(student: Tensor, teacher: Tensor, label: Tensor, *, standardized: bool = False) -> Tensor:
    """Absolute difference of student's and teacher's mean logits by true class, without the diagonal.

    Args:
        student: logits ``(N, C)``.
        teacher: logits ``(N, C)``.
        label: ``(N,)``.
        standardized: z-score each sample's logits first (LSKD). No distillation by softmax fixes the offset of a
            sample's logits, and some methods leave their scale free as well; both then count for nothing.

    Returns:
        ``(C, C)``; row: true class, column: logit. The diagonal, which the published code sets to 0, is NaN, so that
        means are over the other cells.
    """
    if standardized:
        student, teacher = standardize(student), standardize(teacher)
    means = [class_means(logits, label, student.shape[1]) for logits in (student, teacher)]
    return (means[0] - means[1]).abs().fill_diagonal_(torch.nan)


def difference_maps(
    section: Section, methods: list[str], reader: LogitReader, *, standardized: bool = False
) -> list[DifferenceMap]:
    """The maps of some methods of a pair, each the mean over its seeds.

    Args:
        section: the pair.
        methods: options of the loss group, in the order of the figure.
        reader: runs the networks.
        standardized: see :func:`logit_differences`.

    Raises:
        ValueError: there is no run of a method.
    """
    return [_map(row, reader, standardized) for row in _rows(section, methods)]


def _rows(section: Section, methods: list[str]) -> list[Row]:
    rows = [row for method in methods for row in section.rows if row.method == method and row.teacher]
    known = sorted({row.method for row in section.rows if row.teacher})
    missing = [method for method in methods if method not in known]
    if missing:
        raise ValueError(
            f"there is no finished run of {section.title} with loss={missing[0]}; choose among {', '.join(known)} "
            "with --methods."
        )
    return rows


def _map(row: Row, reader: LogitReader, standardized: bool) -> DifferenceMap:
    read = [reader.read(run) for run in row.runs]
    cells = [logit_differences(one.student, one.teacher, one.label, standardized=standardized) for one in read]
    return DifferenceMap(row.name, row.n, torch.stack(cells).mean(0), read[0].class_names)


@styled
def draw_differences(maps: list[DifferenceMap], title: str, *, top: float | None = None) -> Figure:
    """Draws maps side by side with one colour scale; of exactly two, also the second minus the first.

    Args:
        maps: one a method.
        title: heading.
        top: upper end of the scale, to compare figures; None takes what 99.5 % of each map's cells are below.
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
        shown = _show(axes, one.cells, one.class_names, cmap=SEQUENTIAL, vmin=0, vmax=largest)
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
        shown = _show(panels[2], change, first.class_names, cmap=DIVERGING, vmin=-end, vmax=end)
        mean = f"{float(change.nanmean()):+.3f}".replace("-", "\u2212")
        panels[2].set_title(f"{second.name} \u2212 {first.name}\nmean {mean}")
        figure.colorbar(
            shown, ax=panels[2], location="bottom", aspect=25, extend="both", label="orange: the second is further away"
        )
    return figure


def _show(axes: Axes, cells: Tensor, class_names: list[str], **scale: object) -> object:
    axes.set_facecolor(PALE)
    image = axes.imshow(cells.numpy(), interpolation="nearest", **scale)
    axes.set_xlabel("class of the logit")
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("true class")
    if len(class_names) <= MOST_NAMES:
        places = range(len(class_names))
        axes.set_xticks(places, class_names, rotation=90 if max(map(len, class_names)) > 2 else 0)
        axes.set_yticks(places, class_names if axes.get_subplotspec().is_first_col() else [])
    for side in axes.spines.values():
        side.set_visible(False)
    return image
