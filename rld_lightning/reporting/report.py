"""The report of finished runs as HTML, Markdown and CSV."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from rld_lightning.atomic_files import write_whole
from rld_lightning.console import duration
from rld_lightning.errors import printable
from rld_lightning.hydra.quoting import as_command
from rld_lightning.package_files import script_command
from rld_lightning.reporting.chapters import RESULTS, Chapter, Sources, cost_figure, make_chapter, make_sweep_chapter
from rld_lightning.reporting.frame import BEST, RUN_COLUMNS, read_frame, write_csv
from rld_lightning.reporting.known_cost import CostOf, known_cost
from rld_lightning.reporting.labels import in_markdown, mean_and_std, short_key, short_value
from rld_lightning.reporting.latex import write_latex
from rld_lightning.reporting.links import folder_link, paper_links, wandb_link
from rld_lightning.reporting.paper import EPOCHS
from rld_lightning.reporting.style import page_colour
from rld_lightning.reporting.sweeps import Sweep, split_sweeps
from rld_lightning.reporting.tables import Section, compare, sections
from rld_lightning.runs.files import CONFIG, ENVIRONMENT, ERROR, SWEEP, read_text
from rld_lightning.runs.finished import Found, Run
from rld_lightning.runs.folder import check_folder

MAX_TRIALS = 100  # rows of a sweep's table on the page; the CSV has all
ROWS_TO_FILTER = 6  # tables with more rows have a filter field
PICTURES = ("pdf", "svg")
PAGE, MARKDOWN, FIGURES, LATEX = "report.html", "report.md", "figures", "results.tex"
TABLES = ("results", "comparisons", "sweeps", "runs")

READING_NOTES = (
    "Accuracy is top-1 in percent; ± is the sample standard deviation (n - 1) over seeds. The best epoch is chosen on "
    "the images it is measured on, as in published tables, which flatters it; differences are of the last epoch. "
    "vs ce and vs kd are mean differences over the seeds in common with the student alone and with plain KD, where "
    "those were trained with the same recipe; of several, with the strongest of those that share the most seeds.",
)


class ReportFiles(NamedTuple):
    """The files that :func:`write_report` wrote."""

    html: Path
    markdown: Path
    tables: list[Path]
    figures: list[Path]
    latex: Path | None = None


def write_report(
    folders: Sequence[Path | str],
    out: Path | str,
    *,
    title: str = "Results",
    cost_of: CostOf = known_cost,
    latex: bool = False,
    pictures: Sequence[str] = (),
) -> ReportFiles:
    """Reads run directories; writes ``report.html`` (self-contained), ``report.md`` with ``figures/`` and CSV files.

    Args:
        folders: searched for finished runs at any depth; runs that cannot be read are listed and skipped.
        latex: whether to write the results tables for papers, too, as ``results.tex``.
        pictures: formats of figures in addition to PNG: ``pdf``, ``svg``.
        cost_of: returns a network's cost; by default from the summary of a run that trained it.

    Returns:
        the paths of the files.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: there is no finished run, a format is unknown, or a link points outside ``out``.
    """
    if unknown := sorted(set(pictures) - set(PICTURES)):
        raise ValueError(f"figures cannot be written as {', '.join(unknown)}; choose from {', '.join(PICTURES)}.")
    places, out = [Path(folder) for folder in folders], Path(out)
    check_folder(out, "--out", (PAGE, MARKDOWN, FIGURES, LATEX, *(f"{table}.csv" for table in TABLES)))
    frame, everything = read_frame(places)
    if frame.empty:
        raise ValueError(_no_finished_runs(places, everything))
    sweeps, to_compare = split_sweeps(frame)
    in_part = to_compare[~to_compare["complete"]].sort_values(["dataset", "pair", "method", "seed"], kind="stable")
    pair_sections, left_out = sections(to_compare)
    out.mkdir(parents=True, exist_ok=True)
    _remove_earlier(out)
    sources = Sources()
    pairs = _anchors(f"pair {s.title} {s.dataset}{'' if s.on_test else ' held out'}" for s in pair_sections)
    chapters = [make_chapter(section, anchor, sources) for section, anchor in zip(pair_sections, pairs, strict=True)]
    names = _anchors(f"sweep {sweep.title}" for sweep in sweeps)
    sweep_chapters = [make_sweep_chapter(*pair, everything.unfinished) for pair in zip(sweeps, names, strict=True)]
    by_data: dict[str, list[Section]] = {}
    for section in [section for section in pair_sections if section.on_test] or pair_sections:
        by_data.setdefault(section.dataset, []).append(section)
    costs = zip(by_data.values(), _anchors(f"cost {dataset}" for dataset in by_data), strict=True)
    scatters = [figure for group, name in costs if (figure := cost_figure(group, name, cost_of)) is not None]
    context = {
        "title": title,
        "made": f"{datetime.now():%Y-%m-%d %H:%M}",
        "folders": places,
        "runs": everything.runs,
        "findings": [chapter.finding for chapter in chapters if chapter.finding],
        "reading": READING_NOTES if chapters else (),
        "chapters": chapters,
        "sweeps": sweep_chapters,
        "in_part": [(line, *_progress(line.run)) for line in in_part.itertuples()],
        "scatters": scatters,
        "unfinished": [(folder, _reason(folder)) for folder in everything.unfinished],
        "left_out": [*everything.broken, *left_out],
        "sources": [(sources.letter(key), number) for key, number in sources.used.items()],
        "environments": _environments(everything.runs),
        "commands": [
            (run.folder, folder_link(run.folder, out), wandb_link(run.folder), _command(run)) for run in everything.runs
        ],
        "published_epochs": {
            dataset: EPOCHS[dataset]
            for dataset in dict.fromkeys(chapter.section.dataset for chapter in chapters if chapter.has_published)
        },
        "max_trials": MAX_TRIALS,
        "rows_to_filter": ROWS_TO_FILTER,
    }
    (out / FIGURES).mkdir(exist_ok=True)
    figures = [figure for chapter in chapters for figure in (*chapter.figures, chapter.confusion) if figure]
    figures += [figure for chapter in sweep_chapters for figure in chapter.figures] + scatters
    return ReportFiles(
        render("report.html.j2", context, out / PAGE),
        render("report.md.j2", context, out / MARKDOWN),
        _write_tables(chapters, sweeps, frame[list(RUN_COLUMNS)], out),
        [path for figure in figures for path in figure.write(out / FIGURES, ("png", *dict.fromkeys(pictures)))],
        write_latex(chapters, out / LATEX) if latex else None,
    )


def _remove_earlier(out: Path) -> None:
    """Removes the tables and figures of an earlier report in this folder; the new one may have fewer."""
    page = out / MARKDOWN
    if not page.is_file():  # reading a pipe would block
        return
    pictures = re.findall(r"\]\((figures/[^()/]+)\.png\)", page.read_text(encoding="utf-8"))
    kinds = ("png", *PICTURES)
    for name in (
        *(f"{picture}.{kind}" for picture in pictures for kind in kinds),
        *(f"{table}.csv" for table in TABLES),
        LATEX,
    ):
        (out / name).unlink(missing_ok=True)


def _anchors(titles: Iterable[str]) -> list[str]:
    """Unique link and file names for titles, such as ``pair-resnet20-to-resnet8-cifar100``."""
    anchors: list[str] = []
    for title in titles:
        name = re.sub(r"[^a-z0-9_]+", "-", title.lower().replace("→", "to")).strip("-")[:80]
        taken = sum(anchor == name or re.fullmatch(rf"{name}-\d+", anchor) is not None for anchor in anchors)
        anchors.append(f"{name}-{taken + 1}" if taken else name)
    return anchors


def _no_finished_runs(folders: Sequence[Path], found: Found) -> str:
    where = ", ".join(str(folder) for folder in folders)
    if found.broken:
        return f"no finished run in {where} can be read: {found.broken[0][1]}"
    if found.unfinished:
        first = found.unfinished[0]
        reason = _reason(first)
        return f"none of the {len(found.unfinished)} runs in {where} is finished; the first is {first}: {reason}."
    return f"there are no runs in {where}; give folders that {script_command('fit')} has written, such as runs/."


def _reason(folder: Path) -> str:
    error = folder / ERROR
    if error.is_file():
        return " ".join(read_text(error).split())[:400] or "failed without a message"
    return "running or interrupted"


def _progress(run: Run) -> tuple[str, str]:
    """The trained epochs or steps of a run, and the images that it was evaluated on."""
    summary = run.summary
    trained = f"{summary.epochs} epoch{'s' if summary.epochs != 1 else ''}"
    if summary.scheduled_steps is not None:
        trained = f"{summary.steps:,} of {summary.scheduled_steps:,} steps"
    return trained, summary.validated_on


def _environments(runs: Sequence[Run]) -> list[tuple[dict[str, str], list[Path]]]:
    """Each environment with the folders of its runs."""
    groups: dict[tuple[tuple[str, str], ...], list[Path]] = {}
    for run in runs:
        if (run.folder / ENVIRONMENT).exists():
            known = {key: value for key, value in run.environment.items() if key != "command" and value is not None}
            groups.setdefault(tuple((key, _as_text(value)) for key, value in known.items()), []).append(run.folder)
    return [(dict(words), where) for words, where in groups.items()]


def _as_text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _command(run: Run) -> str:
    if run.overrides:
        # Without the overrides that would start the sweep again.
        overrides = [line for line in run.overrides if not line.startswith(("sweep=", "launcher="))]
        if len(overrides) < len(run.overrides) and not any(re.match(r"\+?loss[=@]", line) for line in overrides):
            overrides.append(f"loss={run.choices.get('loss', run.method)}")  # the sweep may have chosen it
        return f"{script_command('fit')} {as_command(overrides)}"
    above = run.folder.parent
    if (above / SWEEP).exists():
        return f"the teacher of all runs in {above}, trained before them"
    if (above / CONFIG).exists():
        return f"a teacher, trained by the run in {above} before its own training"
    return "not recorded; config.yaml has every setting"


def _write_tables(chapters: Sequence[Chapter], sweeps: Sequence[Sweep], frame: pd.DataFrame, out: Path) -> list[Path]:
    results, comparisons = [], []
    for chapter in chapters:
        section = chapter.section
        where: dict[str, str | None] = {"dataset": section.dataset, "split": section.split}
        where |= {"teacher": section.teacher, "student": section.student}
        results.append(_with_columns(where, chapter.lines[list(RESULTS)]))
        comparisons.append(_with_columns(where | {"epoch": "last"}, chapter.comparisons))
        comparisons.append(_with_columns(where | {"epoch": "best"}, compare(section, BEST)))
    trials = []
    for sweep in sweeps:
        first = sweep.runs.iloc[0]
        where = {"sweep": str(sweep.folder)} | {key: first[key] for key in ("dataset", "split", "pair", "method")}
        trials.append(_with_columns(where, sweep.trials.drop(columns=["epochs", "run"])))
    tables = (*(pd.concat(parts) if parts else pd.DataFrame() for parts in (results, comparisons, trials)), frame)
    return [
        write_csv(table, out / f"{name}.csv") for name, table in zip(TABLES, tables, strict=True) if not table.empty
    ]


def _with_columns(where: Mapping[str, str | None], table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([pd.DataFrame([where] * len(table), index=table.index), table], axis=1)


def _each_seed(runs: Sequence[Run] | float) -> str:
    """The last epoch's accuracy by seed, for a tooltip; empty if ``runs`` is not a list (a row without runs: NaN)."""
    if not isinstance(runs, list):
        return ""
    return ", ".join(f"seed {run.summary.seed}: {run.summary.top1:.2f} %" for run in runs)


def _signed(value: float | None) -> str:
    if pd.isna(value):
        return "-"
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _code(text: object) -> str:
    """Text in backticks, unless it contains ``<``, which could be read as HTML."""
    line = " ".join(str(text).split())
    return line if "<" in line else f"`{line.replace('`', chr(39))}`"


class _Escaped(str):
    """A macro's output, whose values are escaped already."""


@cache
def _environment(*, html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rld_lightning.reporting", "."),
        autoescape=html,
        finalize=None if html else lambda value: value if isinstance(value, _Escaped) else in_markdown(value),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.tests["known"] = pd.notna
    environment.filters |= {
        "percent": lambda value: "-" if pd.isna(value) else f"{value:.2f}",
        "spread": lambda pair: "-" if pd.isna(pair[0]) else mean_and_std(*pair),
        "signed": _signed,
        "p_value": lambda p: "-" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}",
        "short_key": short_key,
        "plain": short_value,
        "page_colour": page_colour,
        "code": _code,
        "duration": duration,
        "each_seed": _each_seed,
        "papers": paper_links,
        "escaped": _Escaped,
        "cell": lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    }
    return environment


def render(template: str, context: Mapping[str, Any], path: Path) -> Path:
    """Writes a page of a template in this package's folder: HTML, or Markdown."""
    environment = _environment(html=template.endswith(".html.j2"))
    # `printable`: names may contain characters that change the text's direction, or bytes that are not text.
    write_whole(path, printable(environment.get_template(template).render(**context)).encode())
    return path
