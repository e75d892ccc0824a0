"""The chapters of a report: what its templates show of each pair, and of each sweep."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

import pandas as pd

from rld_lightning.reporting import plots
from rld_lightning.reporting.cost import Cost, network_cost, this_machine
from rld_lightning.reporting.paper import EPOCHS, TEACHER, Published, published_for_pair, published_top1
from rld_lightning.reporting.plots import FigureOfPanels
from rld_lightning.reporting.significance import PairedDifference
from rld_lightning.reporting.sweeps import FinishedSweep, heat_maps, importances
from rld_lightning.reporting.tables import BEST, LAST, Comparison, Row, Section, compare


@dataclass(frozen=True)
class PublishedCell:
    """A published number beside ours.

    Args:
        number: the one that is shown.
        marks: footnote letters of the sources that print it.
        others: what other sources print instead, in percent.
        comparable: whether our row has the epochs and the data of the published ones.
    """

    number: Published
    marks: tuple[str, ...]
    others: tuple[float, ...]
    comparable: bool


@dataclass(frozen=True)
class Line:
    """A line of a results table."""

    role: str
    name: str
    epochs: str
    seeds: str
    n: int
    last: tuple[float, float | None]
    best: tuple[float, float | None] | None
    over_ce: PairedDifference | None
    over_kd: PairedDifference | None
    published: PublishedCell | None


@dataclass(frozen=True)
class Chapter:
    """All about one pair on one split."""

    section: Section
    anchor: str
    lines: list[Line]
    comparisons: list[Comparison]
    figures: list[FigureOfPanels]
    published: list[Published]

    @property
    def has_gains(self) -> bool:
        """Whether any line can be compared with cross-entropy or KD."""
        return any(line.over_ce or line.over_kd for line in self.lines)

    @property
    def has_published(self) -> bool:
        """Whether any line has a published number beside it."""
        return any(line.published for line in self.lines)

    @property
    def tested(self) -> int:
        """How many comparisons have a p value."""
        return sum(found.p_holm is not None for found in self.comparisons)

    @property
    def leader(self) -> Line | None:
        """The line with the highest accuracy in the last epoch, the teacher's aside, if there is something to lead."""
        lines = [line for line in self.lines if line.role != "teacher"]
        return max(lines, key=lambda line: line.last[0]) if len(lines) > 1 else None

    @property
    def notes(self) -> list[str]:
        """What to know when reading the table."""
        notes = []
        if self.section.on_test and self.section.teacher and not self.published:
            notes.append("Nothing is published about this pair in the tables of this package.")
        notes += [
            f"Sources disagree about {line.published.number.method}: others print "
            f"{', '.join(f'{value:.2f}' for value in line.published.others)}."
            for line in self.lines
            if line.published and line.published.others
        ]
        return notes

    @property
    def finding(self) -> str | None:
        """The table in a sentence."""
        if self.leader is None or not self.section.on_test:
            return None
        last = f"{self.leader.last[0]:.2f}" + (f" ± {self.leader.last[1]:.2f}" if self.leader.last[1] else "")
        gains = [
            f"{difference.mean:+.2f} over {base}"
            for base, difference in (("ce", self.leader.over_ce), ("kd", self.leader.over_kd))
            if difference and difference.mean is not None
        ]
        text = f"{self.section.title} on {self.section.dataset}: {self.leader.name} is highest in the last epoch with "
        text += f"{last} % (n = {self.leader.n}){', ' + ' and '.join(gains) if gains else ''}."
        certain = [found for found in self.comparisons if found.verdict in ("ahead", "behind")]
        if self.comparisons:
            text += f" {len(certain)} of {len(self.comparisons)} differences are significant at 5 %"
            text += (
                f"; {len(self.comparisons) - self.tested} cannot be tested."
                if self.tested < len(self.comparisons)
                else "."
            )
        return text


@dataclass(frozen=True)
class SweepChapter:
    """All about one sweep."""

    sweep: FinishedSweep
    anchor: str
    keys: list[str]
    trials: pd.DataFrame
    figures: list[FigureOfPanels]
    notes: list[str]
    failed: int


class Sources:
    """The footnotes of a page: a letter for each source in the order of use."""

    def __init__(self) -> None:
        self.used: dict[str, Published] = {}

    def mark(self, number: Published) -> str:
        """The letter of a number's source."""
        self.used.setdefault(number.source_key, number)
        return self.letter(number.source_key)

    def letter(self, key: str) -> str:
        """The letter of a source that is in use."""
        place = list(self.used).index(key)
        return ascii_lowercase[place % 26] * (1 + place // 26)


def make_chapter(section: Section, anchor: str, sources: Sources) -> Chapter:
    """Tells of a pair: our rows beside the published ones, which differences are certain, and the learning curves.

    Args:
        section: what was measured.
        anchor: its name in links and files.
        sources: where the published numbers leave their footnotes.
    """
    published = published_for_pair(section.dataset, section.teacher, section.student) if section.on_test else []
    lines = [_line(row, section, published, sources, role="teacher") for row in section.teachers]
    if not lines and section.teacher_top1 is not None:
        cell = _published(None, TEACHER, section, published, sources)
        name, measured = section.teacher, (section.teacher_top1, None)
        lines = [Line("teacher", name, "-", "as measured in these runs", 0, measured, None, None, None, cell)]
    lines += [_line(row, section, published, sources) for row in section.rows]
    figure = plots.curves(section, f"{anchor}-curves")
    return Chapter(section, anchor, lines, compare(section), [figure] if figure else [], published)


def _line(row: Row, section: Section, published: Sequence[Published], sources: Sources, role: str = "") -> Line:
    alone = row.method == "ce" and section.teacher is not None
    name = row.name
    if role == "teacher":
        name = f"{section.teacher}, {row.name}"
    elif alone:
        role = "student alone"
    cell = _published(row, TEACHER if role == "teacher" else row.method, section, published, sources)
    gains = (section.gain(row, "ce"), section.gain(row, "kd")) if role != "teacher" else (None, None)
    seeds = ", ".join(str(seed) for seed in row.seeds)
    last, best = ((row.mean(metric), row.std(metric)) for metric in (LAST, BEST))
    return Line(role, name, row.epochs, seeds, row.n, last, best, *gains, cell)


def _published(
    row: Row | None, method: str, section: Section, published: Sequence[Published], sources: Sources
) -> PublishedCell | None:
    standardized = row is not None and row.settings.get("loss.logit_standardization") == "True"
    numbers = published_top1(list(published), method, standardized=standardized)
    if not numbers:
        return None
    same = [number for number in numbers if number.value == numbers[0].value]
    others = sorted({number.value for number in numbers} - {numbers[0].value})
    comparable = row is None or (
        row.epochs == str(EPOCHS.get(section.dataset)) and float(row.settings.get("data.subset", 1)) == 1
    )
    # One or two sources say enough; the table of all published numbers has the rest.
    return PublishedCell(numbers[0], tuple(sources.mark(number) for number in same[:2]), tuple(others), comparable)


def make_sweep_chapter(sweep: FinishedSweep, anchor: str, unfinished: Sequence[Path]) -> SweepChapter:
    """Tells of a sweep: the heat maps, or points where its values are no grid; and Optuna's importances.

    Args:
        sweep: its finished trials.
        anchor: its name in links and files.
        unfinished: folders of runs that did not finish, of any sweep.
    """
    maps = heat_maps(sweep)
    figure = plots.heat_map_figure(maps, sweep, anchor) if maps else plots.value_scatter(sweep, anchor)
    figures, notes = [figure], []
    if sweep.study is not None:
        shares, how = importances(sweep.study)
        if shares:
            figures.append(plots.importance_bars(shares, how, f"{anchor}-importance"))
        else:
            notes.append(how)
    failed = sum(sweep.folder in folder.parents for folder in unfinished)
    return SweepChapter(sweep, anchor, sweep.keys, sweep.trials, figures, notes, failed)


def cost_figures(found: Sequence[Section], *, latency: bool) -> list[FigureOfPanels]:
    """Accuracy over cost, one figure a data set."""
    figures = []
    by_data: dict[str, list[Section]] = defaultdict(list)
    for section in found:
        by_data[section.dataset].append(section)
    for dataset, own in by_data.items():
        runs = [run for section in own for row in (*section.rows, *section.teachers) for run in row.runs]
        names = dict.fromkeys(name for section in own for name in (section.teacher, section.student) if name)
        costs = {name: network_cost(name, runs, latency=latency) for name in names}
        costs: dict[str, Cost] = {name: cost for name, cost in costs.items() if cost is not None}
        if costs:
            figures.append(plots.cost_scatter(own, costs, f"cost-{dataset}", this_machine()))
    return figures
