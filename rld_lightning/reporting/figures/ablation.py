"""RLD's parts switched on one by one, beside the paper's numbers."""

import textwrap
from collections import defaultdict
from dataclasses import dataclass

from matplotlib.figure import Figure

from rld_lightning.reporting.figures.refine import rld_of, usual_rld
from rld_lightning.reporting.paper import Published, published_numbers
from rld_lightning.reporting.significance import PairedDifference
from rld_lightning.reporting.style import PALE, styled
from rld_lightning.reporting.tables import BEST, LAST, Row, Section

# Options of the loss group: whether SCD is on, and MCD's mask.
PARTS = {
    "ce": (False, ""),
    "rld_scd": (True, ""),
    "rld_mcd_g": (False, "M_g"),
    "rld_mcd": (False, "M_ge"),
    "rld_g": (True, "M_g"),
    "rld": (True, "M_ge"),
}
PAPERS_PAIR = "resnet32x4 \u2192 resnet8x4"  # of this one alone the paper prints the ablation


@dataclass(frozen=True)
class AblationRow:
    """One combination of parts.

    Attributes:
        name: the method, and in what it differs from its other rows.
        scd: whether sample confidence is distilled.
        mask: MCD's, or empty without MCD.
        ours: our runs of it; None if there are none.
        over_ce: how far they are ahead of the student alone, over the seeds in common and with the same recipe.
        paper: what the paper prints for its own pair; None if it was not found, or does not belong to these settings.
    """

    name: str
    scd: bool
    mask: str
    ours: Row | None
    over_ce: PairedDifference | None
    paper: Published | None


def ablation(section: Section | None) -> list[AblationRow]:
    """The rows of the table, those that were not run among them.

    What a run switched on is read from its own settings, whichever option they were given to. The paper's number stands
    beside the settings that the option itself has, once; in a row of its own if only others were run.

    Args:
        section: the pair; None gives the paper's numbers alone.
    """
    published = {number.method: number for number in published_numbers()}
    ours = defaultdict(list)
    for row in section.rows if section else ():
        if row.method in PARTS:
            ours[_parts(row)].append(row)
    rows = []
    for option, (scd, mask) in PARTS.items():
        terms = "+".join(["CE", *(["SCD"] if scd else []), *([f"MCD({mask})"] if mask else [])])
        paper = published.get(f"RLD ablation: {'CE only' if terms == 'CE' else terms}")
        found = sorted(ours[scd, mask], key=_as_published, reverse=True)
        if not found or not _as_published(found[0]):
            rows.append(AblationRow(option, scd, mask, None, None, paper))
            paper = None
        for row in found:
            rows.append(AblationRow(row.name, scd, mask, row, section.gain(row, "ce"), paper))
            paper = None
    return rows


def _parts(row: Row) -> tuple[bool, str]:
    loss = rld_of(row.runs[0])
    if loss is None:
        return False, ""
    return loss.alpha > 0, f"M_{loss.mask}" if loss.beta > 0 else ""


def _as_published(row: Row) -> bool:
    """Whether what is on of RLD has the weights and temperatures of ``loss=rld``, and nothing else is added."""
    loss, usual = rld_of(row.runs[0]), usual_rld(row.runs[0])
    if loss is None:
        return True
    weights = [weight for weight in ((loss.alpha, usual.alpha), (loss.beta, usual.beta)) if weight[0] > 0]
    rest = [
        (one.temperature, one.confidence_temperature or one.temperature, one.logit_standardization, one.ce_weight)
        for one in (loss, usual)
    ]
    return bool(weights) and all(own == its for own, its in weights) and rest[0] == rest[1]


def ablation_cells(rows: list[AblationRow]) -> tuple[list[str], list[list[str]]]:
    """Heading and cells of the table: parts, our last and best epochs with n, how far over CE, and the paper's."""
    heading = ["loss", "SCD", "MCD", "last epoch, %", "best epoch, %", "n", "over ce", f"paper, {PAPERS_PAIR}, %"]
    cells = []
    for row in rows:
        ours = ["-", "-", "-", "-"]
        if row.ours is not None:
            ours = [row.ours.spread(LAST), row.ours.spread(BEST), str(row.ours.n), _ahead(row)]
        paper = f"{row.paper.value:.2f}" if row.paper else "-"
        cells.append([row.name, "\u2713" if row.scd else "", row.mask, *ours, paper])
    return heading, cells


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
