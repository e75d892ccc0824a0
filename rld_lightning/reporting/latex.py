r"""A report's results tables in LaTeX with booktabs, one table per pair, for ``\input`` in a paper."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from rld_lightning.atomic_files import write_whole
from rld_lightning.errors import printable
from rld_lightning.reporting.chapters import Chapter

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "→": r"$\rightarrow$", "±": r"$\pm$", "\N{MINUS SIGN}": "$-$",
    "†": r"$\dagger$", "‡": r"$\ddagger$", "≥": r"$\geq$",
}  # fmt: skip


def write_latex(chapters: Sequence[Chapter], path: Path) -> Path:
    """Writes one table per chapter to a file, with the leader in bold and published numbers marked as on the page."""
    head = r"% \usepackage{booktabs} in the preamble. Written by rld-lightning report." + "\n"
    write_whole(path, printable(head + "".join(f"\n{_table(chapter)}" for chapter in chapters)).encode())
    return path


def escape(text: object) -> str:
    """Escapes a text for LaTeX and joins its lines."""
    return "".join(_SPECIAL.get(letter, letter) for letter in " ".join(str(text).split()))


def _table(chapter: Chapter) -> str:
    section = chapter.section
    columns = ["Method", "Last epoch", "Best epoch", "Epochs", "$n$"]
    columns += [r"$\Delta$ CE", r"$\Delta$ KD"] if chapter.has_gains else []
    columns += ["Published"] if chapter.has_published else []
    lines = [_line(chapter, place, line) for place, line in chapter.lines.iterrows()]
    teachers = int((chapter.lines["role"] == "teacher").sum())
    tabular = rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}"
    body = [*lines[:teachers], *([r"\midrule"] if 0 < teachers < len(lines) else []), *lines[teachers:]]
    caption = f"{section.title} on {section.dataset}: top-1 in percent on {section.split}, mean ± standard deviation "
    caption += "over n seeds."
    if chapter.leader is not None and len(chapter.peers) < len(chapter.lines) - teachers:
        caption += f" Bold: the highest of the {len(chapter.peers)} with one recipe and n ≥ {chapter.peers['n'].min()}."
    if not section.on_test:
        caption += " Not the test split."
    if chapter.has_published:
        caption += " Published numbers are not ours; ‡: trained differently from the row; †: second-hand."
    return "\n".join(
        [
            r"\begin{table}", r"\centering", rf"\caption{{{escape(caption)}}}", rf"\label{{tab:{chapter.anchor}}}",
            tabular, r"\toprule", f"{' & '.join(columns)} \\\\", r"\midrule",
            *body, r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
        ]
    )  # fmt: skip


def _line(chapter: Chapter, place: object, line: pd.Series) -> str:
    name = f"{line['method']} ({line['role']})" if line["role"] else line["method"]
    last = _spread(line["last_mean"], line["last_std"])
    cells = [
        escape(name), rf"\textbf{{{last}}}" if place == chapter.leader else last,
        _spread(line["best_mean"], line["best_std"]), escape(line["epochs"]).replace("-", "--"), str(line["n"] or "--"),
    ]  # fmt: skip
    if chapter.has_gains:
        cells += [_gain(line["last_over_ce"]), _gain(line["last_over_kd"])]
    if chapter.has_published:
        cells.append(_published(line))
    return " & ".join(cells) + r" \\"


def _spread(mean: float, std: float) -> str:
    if pd.isna(mean):
        return "--"
    return f"{mean:.2f}" if pd.isna(std) else rf"{mean:.2f} $\pm$ {std:.2f}"


def _gain(value: float) -> str:
    return "--" if pd.isna(value) else f"${value:+.2f}$"


def _published(line: pd.Series) -> str:
    if pd.isna(line["published_top1"]):
        return "--"
    marks = ("†" if line["published_second_hand"] else "") + ("" if line["published_comparable"] else "‡")
    return f"{line['published_top1']:.2f}" + (f"\\textsuperscript{{{escape(marks)}}}" if marks else "")
