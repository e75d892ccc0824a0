"""One page that says what finished runs came to: HTML, Markdown, and CSV to compute on."""

import json
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import jinja2
import pandas as pd

from rld_lightning.reporting.chapters import Chapter, Sources, cost_figures, make_chapter, make_sweep_chapter
from rld_lightning.reporting.labels import mean_and_std, short_key, short_value
from rld_lightning.reporting.paper import EPOCHS
from rld_lightning.reporting.plots import FigureOfPanels, page_colour
from rld_lightning.reporting.sweeps import FinishedSweep, split_sweeps
from rld_lightning.reporting.tables import BEST, LAST, compare, runs_table, sections
from rld_lightning.runs.files import ERROR, SWEEP
from rld_lightning.runs.finished import Run, find_all

MAX_TRIALS = 100  # lines of a sweep's table on the page; the CSV has all
TABLES = ("results", "comparisons", "sweeps", "runs")

READING = (
    "Accuracy is top-1 in percent; ± is the sample standard deviation (n - 1) over seeds. The best epoch is chosen on "
    "the images it is measured on, as in published tables, which flatters it; differences are of the last epoch. "
    "vs ce and vs kd are mean differences over the seeds in common with the student alone and with plain KD, where "
    "those were trained with the same recipe; of several, with the strongest of those that share the most seeds.",
)


class ReportFiles(NamedTuple):
    """What :func:`write_report` has written."""

    html: Path
    markdown: Path
    tables: list[Path]
    figures: list[Path]


def write_report(
    folders: Sequence[Path | str], out: Path | str, *, title: str = "Results", latency: bool = True
) -> ReportFiles:
    """Reads run folders and writes ``report.html`` (self-contained), ``report.md`` with ``figures/``, and CSV files.

    Args:
        folders: where finished runs lie, at any depth.
        out: folder to write to.
        title: heading of the page.
        latency: whether to measure the networks' latency on this machine.

    Returns:
        the paths of what was written.

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: there is no finished run, or the summary of one is broken.
    """
    folders, out = [Path(folder) for folder in folders], Path(out)
    runs, unfinished = find_all(folders)
    if not runs:
        raise ValueError(_nothing_finished(folders, unfinished))
    sweeps, to_compare = split_sweeps(runs)
    found, left_out = sections(to_compare)
    out.mkdir(parents=True, exist_ok=True)
    _remove_earlier(out)
    sources = Sources()
    pairs = _anchors(f"pair {s.title} {s.dataset}{'' if s.on_test else ' held out'}" for s in found)
    chapters = [make_chapter(section, anchor, sources) for section, anchor in zip(found, pairs, strict=True)]
    names = _anchors(f"sweep {sweep.title}" for sweep in sweeps)
    sweep_chapters = [make_sweep_chapter(*pair, unfinished) for pair in zip(sweeps, names, strict=True)]
    scatters = cost_figures([section for section in found if section.on_test] or found, latency=latency)
    context = {
        "title": title,
        "made": f"{datetime.now():%Y-%m-%d %H:%M}",
        "folders": folders,
        "runs": runs,
        "findings": [chapter.finding for chapter in chapters if chapter.finding],
        "reading": READING if chapters else (),
        "chapters": chapters,
        "sweeps": sweep_chapters,
        "scatters": scatters,
        "unfinished": [(folder, _reason(folder)) for folder in unfinished],
        "left_out": left_out,
        "sources": [(sources.letter(key), number) for key, number in sources.used.items()],
        "environments": _environments(runs),
        "commands": [(run.folder, _command(run)) for run in runs],
        "published_epochs": EPOCHS,
    }
    figures = [figure for part in (*chapters, *sweep_chapters) for figure in part.figures] + scatters
    return ReportFiles(
        _render("report.html.j2", context, out / "report.html"),
        _render("report.md.j2", context, out / "report.md"),
        _write_tables(chapters, sweeps, runs, out),
        _write_pngs(figures, out / "figures"),
    )


def _remove_earlier(out: Path) -> None:
    """Removes the tables and figures of an earlier report in the same folder, which may have had more of them."""
    page = out / "report.md"
    if not page.exists():
        return
    pictures = re.findall(r"\]\((figures/[^()/]+\.png)\)", page.read_text(encoding="utf-8"))
    for name in (*pictures, *(f"{table}.csv" for table in TABLES)):
        (out / name).unlink(missing_ok=True)


def _anchors(titles: Iterable[str]) -> list[str]:
    """A name for links and files for each title, such as ``pair-resnet20-to-resnet8-cifar100``; no two are alike."""
    anchors: list[str] = []
    for title in titles:
        name = re.sub(r"[^a-z0-9_]+", "-", title.lower().replace("→", "to")).strip("-")[:80]
        taken = sum(anchor == name or re.fullmatch(rf"{name}-\d+", anchor) is not None for anchor in anchors)
        anchors.append(f"{name}-{taken + 1}" if taken else name)
    return anchors


def _nothing_finished(folders: Sequence[Path], unfinished: Sequence[Path]) -> str:
    where = ", ".join(str(folder) for folder in folders)
    if unfinished:
        first = unfinished[0]
        return f"none of the {len(unfinished)} runs in {where} is finished; the first is {first}: {_reason(first)}."
    return f"there are no runs in {where}; give folders that scripts/fit.py has written, such as runs/."


def _reason(folder: Path) -> str:
    error = folder / ERROR
    if error.exists():
        return " ".join(error.read_text(errors="replace").split())[:400] or "failed, and says nothing"
    return "running or interrupted"


def _environments(runs: Sequence[Run]) -> list[tuple[dict[str, str], list[Path]]]:
    """Each environment, and the runs that had it."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for run in runs:
        if (run.folder / "environment.json").exists():
            groups[json.dumps(run.environment)].append(run.folder)
    return [({k: _words(v) for k, v in json.loads(text).items()}, where) for text, where in groups.items()]


def _words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _command(run: Run) -> str:
    if run.overrides:
        return f"python scripts/fit.py {shlex.join(run.overrides)}"
    above = run.folder.parent
    if (above / SWEEP).exists():
        return f"the teacher of all runs in {above}, trained before them"
    if (above / "config.yaml").exists():
        return f"a teacher, trained by the run in {above} before its own training"
    return "not recorded; config.yaml has every setting"


def _write_tables(
    chapters: Iterable[Chapter], sweeps: Iterable[FinishedSweep], runs: Sequence[Run], out: Path
) -> list[Path]:
    results, comparisons, trials = [], [], []
    for chapter in chapters:
        section = chapter.section
        where = {"dataset": section.dataset, "split": section.split, "teacher": section.teacher}
        where["student"] = section.student
        for line in chapter.lines:
            shown = line.published
            results.append(
                {
                    **where, "role": line.role, "method": line.name, "epochs": line.epochs, "n": line.n,
                    "seeds": line.seeds, "last_mean": line.last[0], "last_std": line.last[1],
                    "best_mean": line.best[0] if line.best else None, "best_std": line.best[1] if line.best else None,
                    "last_over_ce": line.over_ce.difference.mean if line.over_ce else None,
                    "last_over_ce_n": line.over_ce.difference.n if line.over_ce else None,
                    "last_over_kd": line.over_kd.difference.mean if line.over_kd else None,
                    "last_over_kd_n": line.over_kd.difference.n if line.over_kd else None,
                    "published_top1": shown.number.value if shown else None,
                    "published_method": shown.number.method if shown else None,
                    "published_source": shown.number.source if shown else None,
                    "published_second_hand": shown.number.second_hand if shown else None,
                    "published_comparable": shown.comparable if shown else None,
                }
            )  # fmt: skip
        for metric in (LAST, BEST):
            for found in compare(section, metric):
                difference = found.difference
                comparisons.append(
                    {
                        **where, "epoch": "last" if metric == LAST else "best", "first": found.first.name,
                        "second": found.second.name, "n": difference.n, "difference": difference.mean,
                        "ci95_low": difference.low, "ci95_high": difference.high, "p": difference.p,
                        "p_holm": found.p_holm, "verdict": found.verdict,
                    }
                )  # fmt: skip
    for sweep in sweeps:
        first = sweep.runs[0]
        names = {"sweep": str(sweep.folder), "dataset": first.summary.dataset, "split": sweep.split}
        trials += [
            {**names, "pair": first.pair, "method": first.method} | line for line in sweep.trials.to_dict("records")
        ]
    written = []
    tables = (*(pd.DataFrame(lines) for lines in (results, comparisons, trials)), runs_table(runs))
    for name, table in zip(TABLES, tables, strict=True):
        if not table.empty:
            written.append(out / f"{name}.csv")
            table.to_csv(written[-1], index=False)
    return written


def _write_pngs(figures: Iterable[FigureOfPanels], folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [figure.write_png(folder) for figure in figures]


def _signed(value: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _render(template: str, context: dict, path: Path) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rld_lightning.reporting", "."),
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "percent": lambda value: "-" if value is None or pd.isna(value) else f"{value:.2f}",
        "spread": lambda pair: mean_and_std(*pair),
        "signed": _signed,
        "p_value": lambda p: "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        "short_key": short_key,
        "plain": short_value,
        "page_colour": page_colour,
        "text": lambda text: text.replace("<", "&lt;"),
        "cell": lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    }
    path.write_text(environment.get_template(template).render(**context, max_trials=MAX_TRIALS), encoding="utf-8")
    return path
