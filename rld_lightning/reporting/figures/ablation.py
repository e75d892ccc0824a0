"""RLD's parts switched on one by one, beside the paper's numbers."""

import textwrap
from dataclasses import dataclass

from matplotlib.figure import Figure

from rld_lightning.reporting.paper import Published, published_numbers
from rld_lightning.reporting.significance import PairedDifference
from rld_lightning.reporting.style import PALE, styled
from rld_lightning.reporting.tables import BEST, LAST, Row, Section

# Options of the loss group: SCD, and MCD's mask.
PARTS = {
    "ce": ("", ""),
    "rld_scd": ("yes", ""),
    "rld_mcd_g": ("", "M_g"),
    "rld_mcd": ("", "M_ge"),
    "rld_g": ("yes", "M_g"),
    "rld": ("yes", "M_ge"),
}
# What paper_tables.json calls them; of this pair alone the paper prints the ablation.
PUBLISHED = {
    "ce": "CE only",
    "rld_scd": "CE+SCD",
    "rld_mcd_g": "CE+MCD(M_g)",
    "rld_mcd": "CE+MCD(M_ge)",
    "rld_g": "CE+SCD+MCD(M_g)",
    "rld": "CE+SCD+MCD(M_ge)",
}
PAPERS_PAIR = "resnet32x4 \u2192 resnet8x4"


@dataclass(frozen=True)
class AblationRow:
    """One combination of parts.

    Attributes:
        name: the method, and in what it differs from its other rows.
        scd: whether sample confidence is distilled.
        mask: MCD's, or empty without MCD.
        ours: our runs of it; None if there are none.
        over_ce: how far they are ahead of the student alone, over the seeds in common and with the same recipe.
        paper: what the paper prints for its own pair; None if it was not found.
    """

    name: str
    scd: bool
    mask: str
    ours: Row | None
    over_ce: PairedDifference | None
    paper: Published | None


def ablation(section: Section | None) -> list[AblationRow]:
    """The rows of the table, those that were not run among them.

    Args:
        section: the pair; None gives the paper's numbers alone.
    """
    published = {number.method: number for number in published_numbers()}
    rows = []
    for method, (scd, mask) in PARTS.items():
        paper = published.get(f"RLD ablation: {PUBLISHED[method]}")
        found = [row for row in section.rows if row.method == method] if section else []
        for row in found or [None]:
            over_ce = section.gain(row, "ce") if row else None
            rows.append(AblationRow(row.name if row else method, bool(scd), mask, row, over_ce, paper))
    return rows


def ablation_cells(rows: list[AblationRow]) -> tuple[list[str], list[list[str]]]:
    """Heading and cells of the table: parts, our last and best epochs with n, how far over CE, and the paper's."""
    heading = ["loss", "SCD", "MCD", "last epoch, %", "best epoch, %", "n", "over ce", f"paper, {PAPERS_PAIR}, %"]
    cells = []
    for row in rows:
        ours = ["-", "-", "-", "-"]
        if row.ours is not None:
            ours = [_spread(row.ours, LAST), _spread(row.ours, BEST), str(row.ours.n), _ahead(row)]
        paper = f"{row.paper.value:.2f}" if row.paper else "-"
        cells.append([row.name, "\u2713" if row.scd else "", row.mask, *ours, paper])
    return heading, cells


def _spread(row: Row, metric: str) -> str:
    std = row.std(metric)
    return f"{row.mean(metric):.2f}" + ("" if std is None else f" \u00b1 {std:.2f}")


def _ahead(row: AblationRow) -> str:
    if row.over_ce is None or row.over_ce.mean is None:
        return "" if row.ours.method == "ce" else "-"
    return f"{row.over_ce.mean:+.2f}" + (f" (n = {row.over_ce.n})" if row.over_ce.n != row.ours.n else "")


def ablation_markdown(rows: list[AblationRow], title: str) -> str:
    """The table as Markdown, with a line about what is ours and what is not."""
    heading, cells = ablation_cells(rows)
    lines = [heading, ["---"] * 3 + ["---:"] * 5, *cells]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {title}\n\n{table}\n\n{note(rows)}\n"


def note(rows: list[AblationRow]) -> str:
    """Where the numbers come from."""
    epochs = sorted({row.ours.epochs for row in rows if row.ours})
    ours = f"Ours: {', '.join(epochs)} epochs, mean \u00b1 standard deviation over n seeds. " if epochs else ""
    sources = sorted({row.paper.source for row in rows if row.paper})
    return (
        f"{ours}Not ours: the paper's column, {PAPERS_PAIR} on CIFAR-100, 240 epochs, mean of 3 runs "
        f"({'; '.join(sources)})."
    )


@styled
def draw_ablation(rows: list[AblationRow], title: str) -> Figure:
    """Draws the table, the best of our means and of the paper's numbers in bold."""
    heading, cells = ablation_cells(rows)
    figure = Figure(figsize=(9.2, 1.3 + 0.28 * len(cells)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots()
    axes.set_axis_off()
    widths = [max(len(line[column]) for line in [heading, *cells]) + 2 for column in range(len(heading))]
    table = axes.table(
        cells,
        colLabels=heading,
        colWidths=[width / sum(widths) for width in widths],
        cellLoc="right",
        loc="center",
        edges="horizontal",
        bbox=(0, 0, 1, 1),
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    bold = _best([row.ours.mean() if row.ours else None for row in rows], column=3)
    bold |= _best([row.ours.mean(BEST) if row.ours else None for row in rows], column=4)
    bold |= _best([row.paper.value if row.paper else None for row in rows], column=7)
    for (line, column), cell in table.get_celld().items():
        cell.set_edgecolor(PALE)
        if column < 3:
            cell.set_text_props(ha="left" if column == 0 else "center")
        if line == 0 or (line - 1, column) in bold:
            cell.set_text_props(fontweight="bold")
    figure.supxlabel(textwrap.fill(note(rows), 150), fontsize=7.5)
    return figure


def _best(values: list[float | None], column: int) -> set[tuple[int, int]]:
    known = [value for value in values if value is not None]
    return {(line, column) for line, value in enumerate(values) if len(known) > 1 and value == max(known)}
