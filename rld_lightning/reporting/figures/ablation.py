"""The ablation of RLD: its parts enabled one by one, with the paper's numbers."""

import textwrap
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from rld_lightning.reporting.figures import register_figure
from rld_lightning.reporting.figures.refine import default_rld, rld_of
from rld_lightning.reporting.frame import BEST, LAST
from rld_lightning.reporting.labels import in_markdown, mean_and_std
from rld_lightning.reporting.paper import published_numbers
from rld_lightning.reporting.style import PALE, save_figure, styled
from rld_lightning.reporting.tables import Section, choose_pair
from rld_lightning.runs.finished import Run

# Options of the loss group: whether SCD is on, and MCD's mask.
PARTS = {
    "ce": (False, ""),
    "rld_scd": (True, ""),
    "rld_mcd_g": (False, "M_g"),
    "rld_mcd": (False, "M_ge"),
    "rld_g": (True, "M_g"),
    "rld": (True, "M_ge"),
}
PAPERS_PAIR = "resnet32x4 \u2192 resnet8x4"  # the only pair in the paper's ablation
HEADING = ["loss", "SCD", "MCD", "last epoch, %", "best epoch, %", "n", "over ce", f"paper, {PAPERS_PAIR}, %"]
_OURS = ["method", "n", "epochs", f"{LAST}_mean", f"{LAST}_std", f"{BEST}_mean", f"{BEST}_std"]


@register_figure("ablation", "table of RLD's parts beside the paper's")
def write_ablation(out: Path, runs: pd.DataFrame, *, pair: str | None = None) -> list[Path]:
    """Writes the ablation table as a picture and as Markdown; without runs it has only the paper's numbers."""
    section = None if runs.empty else choose_pair(runs, pair)
    table = ablation(section)
    title = f"Ablation of RLD, {section.title}, {section.dataset}, {section.split}" if section else "Ablation of RLD"
    files = save_figure(draw_ablation(table, title), out, "ablation")
    (out / "ablation.md").write_text(ablation_markdown(table, title), encoding="utf-8")
    return [*files, out / "ablation.md"]


def ablation(section: Section | None) -> pd.DataFrame:
    """The rows of the table, including those that were not run.

    The parts that a run enabled are read from its settings, not from its option. The paper's number is shown once,
    in the row with the option's own settings; in a separate row if there is no such run.

    Args:
        section: the pair; None for only the paper's numbers.

    Returns:
        one line per row: ``name``, ``scd`` and ``mask`` (MCD's, or empty); of our runs, missing without any, columns of
        :attr:`Section.rows` and the gain over the student alone, ``over_ce`` over ``over_ce_n`` seeds; the paper's
        number, ``paper``, and its ``source``.
    """
    published = {number.method: number for number in published_numbers()}
    ours = section.rows[section.rows["method"].isin(PARTS)] if section else pd.DataFrame(columns=["runs", *_OURS])
    parts = {name: _parts(row["runs"][0]) for name, row in ours.iterrows()}
    lines = []
    for option, (scd, mask) in PARTS.items():
        terms = "+".join(["CE", *(["SCD"] if scd else []), *([f"MCD({mask})"] if mask else [])])
        number = published.get(f"RLD ablation: {'CE only' if terms == 'CE' else terms}")
        paper = {"paper": number.value, "source": number.source} if number else {}
        names = [name for name, own in parts.items() if own == (scd, mask)]
        names.sort(key=lambda name: not _as_published(ours.at[name, "runs"][0]))
        if not names or not _as_published(ours.at[names[0], "runs"][0]):
            lines.append({"name": option, "scd": scd, "mask": mask} | paper)
            paper = {}
        for name in names:
            gain = section.gain(name, "ce") if section else None
            ahead = {"over_ce": gain.mean, "over_ce_n": gain.n} if gain else {}
            lines.append({"name": name, "scd": scd, "mask": mask, **ours.loc[name, _OURS], **ahead, **paper})
            paper = {}
    return pd.DataFrame(lines, columns=["name", "scd", "mask", *_OURS, "over_ce", "over_ce_n", "paper", "source"])


def _parts(run: Run) -> tuple[bool, str]:
    loss = rld_of(run)
    if loss is None:
        return False, ""
    return loss.alpha > 0, f"M_{loss.mask}" if loss.beta > 0 else ""


def _as_published(run: Run) -> bool:
    """Whether the enabled parts have the weights and temperatures of ``loss=rld``, with no other changes."""
    loss, usual = rld_of(run), default_rld(run)
    if loss is None:
        return True
    weights = [(own, default) for own, default in ((loss.alpha, usual.alpha), (loss.beta, usual.beta)) if own > 0]
    rest = [
        (one.temperature, one.confidence_temperature or one.temperature, one.logit_standardization, one.ce_weight)
        for one in (loss, usual)
    ]
    return bool(weights) and all(own == default for own, default in weights) and rest[0] == rest[1]


def ablation_cells(table: pd.DataFrame) -> list[list[str]]:
    """The cells below :data:`HEADING`: parts, our last and best epochs with n, gain over CE, and the paper's number."""
    cells = []
    for row in table.itertuples():
        ours = ["-", "-", "-", "-"]
        if pd.notna(row.n):
            ahead = "" if row.method == "ce" else "-"
            if pd.notna(row.over_ce):
                ahead = f"{row.over_ce:+.2f}" + (f" (n = {row.over_ce_n:g})" if row.over_ce_n != row.n else "")
            last = mean_and_std(row.top1_last_mean, row.top1_last_std)
            ours = [last, mean_and_std(row.top1_best_mean, row.top1_best_std), f"{row.n:g}", ahead]
        paper = f"{row.paper:.2f}" if pd.notna(row.paper) else "-"
        cells.append([row.name, "\u2713" if row.scd else "", row.mask, *ours, paper])
    return cells


def ablation_markdown(table: pd.DataFrame, title: str) -> str:
    """The table as Markdown, with :func:`note` below."""
    cells = [[in_markdown(text).replace("|", "\\|") for text in line] for line in ablation_cells(table)]
    lines = "\n".join(f"| {' | '.join(line)} |" for line in [HEADING, ["---"] * 3 + ["---:"] * 5, *cells])
    return f"## {in_markdown(title)}\n\n{lines}\n\n{note(table)}\n"


def note(table: pd.DataFrame) -> str:
    """A sentence on the sources of the numbers."""
    epochs = ", ".join(sorted(set(table["epochs"].dropna())))
    ours = (
        f"Ours: {epochs} epoch{'' if epochs == '1' else 's'}, mean \u00b1 standard deviation over n seeds. "
        if epochs
        else ""
    )
    return (
        f"{ours}Not ours: the paper's column, {PAPERS_PAIR} on CIFAR-100, 240 epochs, mean of 3 runs "
        f"({'; '.join(sorted(set(table['source'].dropna())))})."
    )


@styled
def draw_ablation(table: pd.DataFrame, title: str) -> Figure:
    """Draws the table, with the best of our means and of the paper's numbers in bold."""
    cells = ablation_cells(table)
    figure = Figure(figsize=(9.2, 1.3 + 0.28 * len(cells)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots()
    axes.set_axis_off()
    widths = [max(len(line[column]) for line in [HEADING, *cells]) + 2 for column in range(len(HEADING))]
    drawn = axes.table(
        cells, colLabels=HEADING, colWidths=[width / sum(widths) for width in widths], cellLoc="right", loc="center",
        edges="horizontal", bbox=Bbox.unit(),
    )  # fmt: skip
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    bold = set()
    for column, values in ((3, table[f"{LAST}_mean"]), (4, table[f"{BEST}_mean"]), (7, table["paper"])):
        if values.count() > 1:
            bold |= {(line, column) for line in values.index[values == values.max()]}
    for (line, column), cell in drawn.get_celld().items():
        cell.set_edgecolor(PALE)
        if column < 3:
            cell.set_text_props(ha="left" if column == 0 else "center")
        if line == 0 or (line - 1, column) in bold:
            cell.set_text_props(fontweight="bold")
    figure.supxlabel(textwrap.fill(note(table), 150), fontsize=7.5)
    return figure
