"""The chapters of a report: what its templates show of each pair, and of each sweep."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

from rld_lightning.reporting import plots
from rld_lightning.reporting.cost import Cost, network_cost, this_machine
from rld_lightning.reporting.labels import mean_and_std, short_value
from rld_lightning.reporting.paper import (
    TEACHER,
    Published,
    is_published_method,
    is_published_teacher,
    published_for_pair,
    published_top1,
    trained_as_published,
)
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
        comparable: whether our row is known to be trained as the published one.
    """

    number: Published
    marks: tuple[str, ...]
    others: tuple[float, ...]
    comparable: bool


@dataclass(frozen=True)
class Gain:
    """How far a line is ahead of ``ce`` or ``kd``.

    Args:
        difference: over the seeds in common.
        base: the row that it is ahead of, by name; empty if there is no other.
        seeds: how many are in common, ``n = 2``; empty if all of the line's are.
    """

    difference: PairedDifference
    base: str
    seeds: str

    @property
    def note(self) -> str:
        """What to know beside the number."""
        return ", ".join(part for part in (self.seeds, self.base and f"to {self.base}") if part)


@dataclass(frozen=True)
class Line:
    """A line of a results table.

    Args:
        role: ``teacher``, ``student alone`` or empty.
        name: of the method.
        epochs: how many.
        seeds: all of them, as text.
        n: how many; 0 of a teacher's accuracy that its students' runs have measured.
        last: mean and standard deviation of the last epoch.
        best: of the best epoch.
        over_ce: how far it is ahead of the student alone.
        over_kd: how far it is ahead of KD.
        published: what others have measured.
        row: the runs; None without any.
    """

    role: str
    name: str
    epochs: str
    seeds: str
    n: int
    last: tuple[float, float | None]
    best: tuple[float, float | None] | None
    over_ce: Gain | None
    over_kd: Gain | None
    published: PublishedCell | None
    row: Row | None = None

    @property
    def few_seeds(self) -> str:
        """The seeds in short, ``0-4``; empty without any."""
        seeds = self.row.seeds if self.row else []
        if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
            return f"{seeds[0]}-{seeds[-1]}"
        return ", ".join(map(str, seeds))


@dataclass(frozen=True)
class Chapter:
    """All about one pair on one split."""

    section: Section
    anchor: str
    lines: list[Line]
    comparisons: list[Comparison]
    untested: int
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
    def peers(self) -> list[Line]:
        """The lines with the most common recipe, and of those the ones with the most seeds that two of them have."""
        recipes = {
            id(line): frozenset(line.row.recipe(with_teacher=False).items())
            for line in self.lines
            if line.row and line.role != "teacher"
        }
        if not recipes:
            return []
        common = Counter(recipes.values()).most_common(1)[0][0]
        lines = [line for line in self.lines if recipes.get(id(line)) == common]
        seeds = sorted((line.n for line in lines), reverse=True)
        return [line for line in lines if line.n >= seeds[:2][-1]]

    @property
    def leader(self) -> Line | None:
        """Of :attr:`peers` the one with the highest accuracy in the last epoch, if there is something to lead."""
        return max(self.peers, key=lambda line: line.last[0]) if len(self.peers) > 1 else None

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
        leader, peers = self.leader, self.peers
        if leader is None or not self.section.on_test:
            return None
        text = f"{self.section.title} on {self.section.dataset}: "
        if len(peers) < sum(line.row is not None and line.role != "teacher" for line in self.lines):
            text += f"of the {len(peers)} rows with one recipe and n ≥ {min(line.n for line in peers)}, "
        text += f"{leader.name} is highest in the last epoch with {mean_and_std(*leader.last)} % (n = {leader.n})"
        for base, gain in (("ce", leader.over_ce), ("kd", leader.over_kd)):
            if gain and gain.difference.mean is not None:
                text += f", {gain.difference.mean:+.2f} over {gain.base or base}"
                text += f" ({gain.seeds})" if gain.seeds else ""
        own = [found for found in self.comparisons if leader.row in (found.first, found.second)]
        if not own:
            return f"{text}; not tested against any other."
        beaten = sum(found.verdict == ("ahead" if found.first is leader.row else "behind") for found in own)
        return f"{text}; ahead of {beaten} of the {len(own)} that it was tested against at 5 % (Holm)."


@dataclass(frozen=True)
class SweepChapter:
    """All about one sweep."""

    sweep: FinishedSweep
    anchor: str
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
    for weights, top1 in section.teacher_top1.items():
        cell = _published(TEACHER, section, published, sources, comparable=is_published_teacher(published, top1))
        name = section.teacher + (f", {short_value(weights)}" if len(section.teacher_top1) > 1 else "")
        lines.append(Line("teacher", name, "-", "as measured in these runs", 0, (top1, None), None, None, None, cell))
    lines += [_line(row, section, published, sources) for row in section.rows]
    comparisons = compare(section)
    tested = [found for found in comparisons if found.p_holm is not None]
    figure = plots.curves(section, f"{anchor}-curves")
    untested = len(comparisons) - len(tested)
    return Chapter(section, anchor, lines, tested, untested, [figure] if figure else [], published)


def _line(row: Row, section: Section, published: Sequence[Published], sources: Sources, role: str = "") -> Line:
    alone = row.method == "ce" and section.teacher is not None
    name = row.name
    if role == "teacher":
        name = f"{section.teacher}, {row.name}"
    elif alone:
        role = "student alone"
    cell = None
    if is_published_method(row.method, row.runs[0].settings):
        method = TEACHER if role == "teacher" else row.method
        comparable = all(trained_as_published(run) for run in row.runs)
        cell = _published(method, section, published, sources, comparable=comparable)
    gains = (_gain(row, section, "ce"), _gain(row, section, "kd")) if role != "teacher" else (None, None)
    seeds = ", ".join(str(seed) for seed in row.seeds)
    last, best = ((row.mean(metric), row.std(metric)) for metric in (LAST, BEST))
    return Line(role, name, row.epochs, seeds, row.n, last, best, *gains, cell, row)


def _gain(row: Row, section: Section, method: str) -> Gain | None:
    difference, base = section.gain(row, method), section.baseline(row, method)
    if difference is None or base is None:
        return None
    several = len(section.baselines(row, method)) > 1
    return Gain(difference, base.name if several else "", f"n = {difference.n}" if difference.n < row.n else "")


def _published(
    method: str, section: Section, published: Sequence[Published], sources: Sources, *, comparable: bool
) -> PublishedCell | None:
    numbers = published_top1(list(published), method)
    if not numbers:
        return None
    first = numbers[0]
    same = [number for number in numbers if number.value == first.value]
    others = sorted({number.value for number in numbers if not number.other_recipe} - {first.value})
    # One or two sources say enough; the table of all published numbers has the rest.
    marks = tuple(sources.mark(number) for number in same[:2])
    return PublishedCell(first, marks, tuple(others), comparable and not first.other_recipe)


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
    return SweepChapter(sweep, anchor, figures, notes, failed)


def cost_figures(found: Sequence[Section], *, latency: bool) -> list[FigureOfPanels]:
    """Accuracy over cost, one figure a data set."""
    figures = []
    by_data: dict[str, list[Section]] = defaultdict(list)
    for section in found:
        by_data[section.dataset].append(section)
    for dataset, own in by_data.items():
        runs = [run for section in own for row in (*section.rows, *section.teachers) for run in row.runs]
        exported = [row.exported for section in own for row in section.rows]
        names = dict.fromkeys([*(section.teacher for section in own if section.teacher), *exported])
        costs = {name: network_cost(name, runs, latency=latency) for name in names}
        costs: dict[str, Cost] = {name: cost for name, cost in costs.items() if cost is not None}
        if costs:
            figures.append(plots.cost_scatter(own, costs, f"cost-{dataset}", this_machine()))
    return figures
