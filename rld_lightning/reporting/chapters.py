"""The chapters of a report: the contents of its templates for each pair and each sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pandas as pd

from rld_lightning.reporting import plots
from rld_lightning.reporting.card import TEACHER_MAY_KNOW
from rld_lightning.reporting.confusion import confusion_figure
from rld_lightning.reporting.known_cost import CostOf, training_cost
from rld_lightning.reporting.labels import mean_and_std, short_value
from rld_lightning.reporting.paper import (
    TEACHER,
    Published,
    departures,
    is_published_method,
    is_published_teacher,
    published_for_pair,
    published_top1,
)
from rld_lightning.reporting.style import FigureOfPanels
from rld_lightning.reporting.sweeps import Sweep, heat_maps, importances
from rld_lightning.reporting.tables import Section, compare, not_shared, rows_of
from rld_lightning.runs.finished import Run

# The columns of a results table that are written as CSV; the templates also use those of `_TEMPLATE_COLUMNS`.
RESULTS = (
    *("role", "method", "epochs", "n", "seeds", "last_mean", "last_std", "best_mean", "best_std"),
    *("images_per_s", "training_s"),
    *("last_over_ce", "last_over_ce_n", "last_over_kd", "last_over_kd_n"),
    *("published_top1", "published_method", "published_source", "published_second_hand", "published_comparable"),
    "published_departures",
)
_TEMPLATE_COLUMNS = ("ce_base", "ce_seeds", "kd_base", "kd_seeds", "marks", "others", "short_seeds", "recipe", "runs")


@dataclass(frozen=True, eq=False)
class Chapter:
    """The results of one pair on one split."""

    section: Section  # the measurements
    anchor: str  # its name in links and files
    lines: pd.DataFrame  # the rows of its table, see `results`
    comparisons: pd.DataFrame  # all of `compare`
    figures: list[FigureOfPanels]  # the learning curves
    published: list[Published]  # all published numbers of the pair
    confusion: FigureOfPanels | None = None  # confusions of the best row; None if not recorded

    @property
    def tested(self) -> pd.DataFrame:
        """The comparisons that could be tested."""
        return self.comparisons.dropna(subset="p_holm")

    @property
    def untested(self) -> int:
        """The number of comparisons that could not be tested."""
        return len(self.comparisons) - len(self.tested)

    @property
    def has_gains(self) -> bool:
        """Whether any line can be compared with cross-entropy or KD."""
        return bool(self.lines[["last_over_ce_n", "last_over_kd_n"]].notna().any(axis=None))

    @property
    def has_published(self) -> bool:
        """Whether any line has a published number beside it."""
        return bool(self.lines["published_top1"].notna().any())

    @property
    def has_cost(self) -> bool:
        """Whether any line has a training speed."""
        return bool(self.lines["images_per_s"].notna().any())

    @property
    def peers(self) -> pd.DataFrame:
        """The lines with the most common recipe that have at least as many seeds as the second most repeated one."""
        lines = self.lines.dropna(subset="recipe")
        if lines.empty:
            return lines
        common = lines.groupby("recipe")["n"].transform("size").idxmax()
        lines = lines[lines["recipe"] == lines.at[common, "recipe"]]
        return lines[lines["n"] >= lines["n"].nlargest(2).iloc[-1]]

    @property
    def leader(self) -> int | None:
        """The index of the line of :attr:`peers` with the highest last-epoch accuracy, if there are several."""
        peers = self.peers
        return int(peers["last_mean"].idxmax()) if len(peers) > 1 else None

    @property
    def notes(self) -> list[str]:
        """Caveats for readers of the table."""
        notes = []
        if self.section.on_test and self.section.teacher and not self.published:
            notes.append("Nothing is published about this pair in the tables of this package.")
        if self.section.teacher_top1 and not self.section.on_test:
            notes.append(TEACHER_MAY_KNOW)
        for name, unshared in self.section.runs.groupby("name", sort=False)["unshared"]:
            if keys := not_shared(list(unshared)):
                notes.append(
                    f"{name} contains runs that do not all have {keys}: ignored as settings that other versions of "
                    "this package lack. If they are yours, set them in each run."
                )
        return notes + [
            f"Sources disagree about {line.published_method}: others print "
            f"{', '.join(f'{value:.2f}' for value in line.others)}."
            for line in self.lines.dropna(subset="published_top1").itertuples()
            if line.others
        ]

    @property
    def finding(self) -> str | None:
        """The table in a sentence."""
        peers = self.peers
        if self.leader is None or not self.section.on_test:
            return None
        leader = self.lines.loc[self.leader]
        text = f"{self.section.title} on {self.section.dataset}: "
        if len(peers) < self.lines["recipe"].count():
            text += f"of the {len(peers)} rows with one recipe and n ≥ {peers['n'].min()}, "
        text += f"{leader['method']} is highest in the last epoch with "
        text += f"{mean_and_std(leader['last_mean'], leader['last_std'])} % (n = {leader['n']})"
        for base in ("ce", "kd"):
            if pd.notna(leader[f"last_over_{base}"]):
                seeds = leader[f"{base}_seeds"]
                text += f", {leader[f'last_over_{base}']:+.2f} over {leader[f'{base}_base'] or base}"
                text += f" ({seeds})" if seeds else ""
        first = self.tested[self.tested["first"] == leader["method"]]["verdict"]
        second = self.tested[self.tested["second"] == leader["method"]]["verdict"]
        if not len(first) + len(second):
            return f"{text}; not tested against any other."
        beaten, tested = (first == "ahead").sum() + (second == "behind").sum(), len(first) + len(second)
        return f"{text}; {_ahead_of(beaten, tested)} that it was tested against at 5 %."


def _ahead_of(beaten: int, tested: int) -> str:
    """``significantly ahead of 2 of the 3 rows``."""
    rows = "row" if tested == 1 else "rows" if tested == beaten == 2 else f"{tested} rows"
    if beaten == 0:
        return f"not significantly ahead of {'any of the' if tested > 1 else 'the one'} {rows}"
    if beaten < tested:
        return f"significantly ahead of {beaten} of the {rows}"
    return f"significantly ahead of {'both' if tested == 2 else 'all' if tested > 2 else 'the one'} {rows}"


@dataclass(frozen=True)
class SweepChapter:
    """The results of one sweep."""

    sweep: Sweep
    anchor: str
    figures: list[FigureOfPanels]
    notes: list[str]
    failed: int


class Sources:
    """The footnotes of a page: a letter for each source, in order of first use."""

    def __init__(self) -> None:
        self.used: dict[str, Published] = {}

    def mark(self, number: Published) -> str:
        """Registers a number's source and returns its letter."""
        self.used.setdefault(number.source_key, number)
        return self.letter(number.source_key)

    def letter(self, key: str) -> str:
        """The letter of a registered source."""
        place = list(self.used).index(key)
        return ascii_lowercase[place % 26] * (1 + place // 26)


def make_chapter(section: Section, anchor: str, sources: Sources) -> Chapter:
    """Collects a pair's results: its rows with published numbers, the tested differences, and the figures."""
    published = published_for_pair(section.dataset, section.teacher, section.student) if section.on_test else []
    figure = plots.curves(section, f"{anchor}-curves")
    lines = results(section, published, sources)
    confusion = confusion_figure(section, f"{anchor}-confusion")
    return Chapter(section, anchor, lines, compare(section), [figure] if figure else [], published, confusion)


def results(section: Section, published: Sequence[Published], sources: Sources) -> pd.DataFrame:
    """The results table of a pair: its teachers first, then the student alone and the methods, best first.

    Returns:
        one line per row, with :data:`RESULTS`: accuracy in percent and gains in percentage points. ``n`` is 0 for a
        teacher's accuracy as measured by its students' runs, unless a listed run has it. Also: ``ce_base`` (the
        baseline row, if there are several), ``ce_seeds`` (the number of seeds in common, if not all are), the same for
        kd; the footnote ``marks`` of the published number, the values of ``others``, ``short_seeds``, and the
        ``recipe``, equal for lines that can be compared.
    """
    lines = []
    single = set()  # accuracies of teachers' runs whose row is theirs alone
    for name, row in rows_of(section.teacher_runs).iterrows():
        single |= {round(row["top1_last_mean"], 2)} if row["n"] == 1 else set()
        lines.append(_measured_columns(row) | {"role": "teacher", "method": f"{section.teacher}, {name}"})
        if is_published_method(row["method"], row["runs"][0].settings):
            lines[-1] |= _published_columns(TEACHER, published, sources, _departures(row["runs"]))
    for weights, top1 in section.teacher_top1.items():
        if round(top1, 2) in single:  # it would be listed twice
            continue
        name = f"{section.teacher}, {short_value(weights)}" if len(section.teacher_top1) > 1 else section.teacher
        lines.append({"role": "teacher", "method": name, "epochs": "-", "n": 0, "seeds": "as measured in these runs"})
        lines[-1] |= {"last_mean": top1, "short_seeds": ""}
        other = [] if is_published_teacher(list(published), top1) else ["another teacher"]
        lines[-1] |= _published_columns(TEACHER, published, sources, other)
    for name, row in section.rows.iterrows():
        alone = row["method"] == "ce" and section.teacher is not None
        lines.append(_measured_columns(row) | {"role": "student alone" if alone else "", "method": name})
        lines[-1] |= (
            {"recipe": row["recipe_alone"]} | _gain_columns(section, name, "ce") | _gain_columns(section, name, "kd")
        )
        if is_published_method(row["method"], row["runs"][0].settings):
            lines[-1] |= _published_columns(row["method"], published, sources, _departures(row["runs"]))
    table = pd.DataFrame(lines, columns=[*RESULTS, *_TEMPLATE_COLUMNS])
    return table.astype({"published_second_hand": object, "published_comparable": object})  # true, false or missing


def _measured_columns(row: pd.Series) -> dict[str, Any]:
    seeds = row["seeds"]
    speed, seconds = training_cost(row["runs"])
    consecutive = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    return {
        "epochs": row["epochs"], "n": row["n"], "seeds": ", ".join(map(str, seeds)),
        "short_seeds": f"{seeds[0]}-{seeds[-1]}" if consecutive else ", ".join(map(str, seeds)),
        "last_mean": row["top1_last_mean"], "last_std": row["top1_last_std"],
        "best_mean": row["top1_best_mean"], "best_std": row["top1_best_std"],
        "images_per_s": speed, "training_s": seconds, "runs": row["runs"],
    }  # fmt: skip


def _gain_columns(section: Section, name: str, method: str) -> dict[str, Any]:
    base = section.baseline(name, method)
    if base is None:
        return {}
    difference = section.difference(name, base)
    return {
        f"last_over_{method}": difference.mean, f"last_over_{method}_n": difference.n,
        f"{method}_base": base if len(section.baselines(name, method)) > 1 else "",
        f"{method}_seeds": f"n = {difference.n}" if difference.n < section.rows.at[name, "n"] else "",
    }  # fmt: skip


def _departures(runs: Sequence[Run]) -> list[str]:
    """How the runs of a row differ from the published rows."""
    return list(dict.fromkeys(words for run in runs for words in departures(run)))


def _published_columns(
    method: str, numbers: Sequence[Published], sources: Sources, departures_of_ours: Sequence[str]
) -> dict[str, Any]:
    numbers = published_top1(list(numbers), method)
    if not numbers:
        return {}
    first = numbers[0]
    same = [number for number in numbers if number.value == first.value]
    words = [*departures_of_ours, *(["the published one was trained otherwise"] if first.other_recipe else [])]
    return {
        "published_top1": first.value, "published_method": first.method, "published_source": first.source,
        "published_second_hand": first.second_hand, "published_comparable": not words,
        "published_departures": "; ".join(words),
        # At most two sources; the table of all published numbers has the rest.
        "marks": [sources.mark(number) for number in same[:2]],
        "others": sorted({number.value for number in numbers if not number.other_recipe} - {first.value}),
    }  # fmt: skip


def make_sweep_chapter(sweep: Sweep, anchor: str, unfinished: Sequence[Path]) -> SweepChapter:
    """Collects a sweep's results: heat maps (points if its values form no grid) and Optuna's importances.

    Args:
        unfinished: folders of unfinished runs, of any sweep.
    """
    maps = heat_maps(sweep)
    figures = [plots.heat_map_figure(maps, sweep, anchor) if maps else plots.value_scatter(sweep, anchor)]
    notes = []
    if sweep.study is not None:
        shares, how = importances(sweep.study)
        if shares:
            figures.append(plots.importance_bars(shares, how, f"{anchor}-importance"))
        else:
            notes.append(how)
    failed = sum(sweep.folder in folder.parents for folder in unfinished)
    return SweepChapter(sweep, anchor, figures, notes, failed)


def cost_figure(sections: Sequence[Section], name: str, cost_of: CostOf) -> FigureOfPanels | None:
    """Plots accuracy over cost for one data set's networks; None if no cost is known."""
    runs = [run for section in sections for part in (section.runs, section.teacher_runs) for run in part["run"]]
    networks = [section.teacher for section in sections if section.teacher]
    networks += [network for section in sections for network in section.rows["network"]]
    costs = {network: cost for network in dict.fromkeys(networks) if (cost := cost_of(network, runs)) is not None}
    return plots.cost_scatter(sections, costs, name) if costs else None
