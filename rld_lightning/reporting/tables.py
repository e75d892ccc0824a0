"""Finished runs as the rows of results tables: repetitions together, everything else apart."""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import pandas as pd

from rld_lightning.reporting.labels import describe, distinguishing, mean_and_std
from rld_lightning.reporting.significance import MIN_PAIRS, PairedDifference, holm, paired_difference
from rld_lightning.runs.files import SUMMARY
from rld_lightning.runs.finished import Run

LAST, BEST = "top1", "top1_best"
TEST_SPLIT = "the test split"
# What a configuration says beside what trains the student.
_NO_EFFECT = ("model.label", "model.tuned", "model.teacher.published_url", "loss._target_")
_WITHOUT_TEACHER = ("model.teacher", "recipe.warmup_epochs", *_NO_EFFECT)


@dataclass(frozen=True)
class Row:
    """One method with one setting on one pair: the runs differ in their seed only.

    Args:
        runs: one a seed, in the order of the seeds.
        settings: what trained them, seeds aside.
        label: in what it differs from the other rows of its method, such as ``alpha=2``; empty if there are none.
    """

    runs: tuple[Run, ...]
    settings: Mapping[str, str]
    label: str = ""

    @property
    def method(self) -> str:
        """The option of the loss group."""
        return self.runs[0].method

    @property
    def name(self) -> str:
        """Method and label."""
        return f"{self.method} ({self.label})" if self.label else self.method

    @property
    def student(self) -> str:
        """The network that was trained."""
        return _network(self.runs[0], "student")

    @property
    def exported(self) -> str:
        """The network that came out; SimKD's ends in the teacher's classifier."""
        return self.runs[0].summary.model

    @property
    def teacher(self) -> str | None:
        """The network that it was distilled from; None of cross-entropy alone."""
        return _network(self.runs[0], "teacher") if self.runs[0].summary.teacher else None

    @property
    def dataset(self) -> str:
        """The name of the data set."""
        return self.runs[0].summary.dataset

    @property
    def n(self) -> int:
        """The number of seeds."""
        return len(self.runs)

    @property
    def seeds(self) -> list[int]:
        """The seeds, in order."""
        return [run.summary.seed for run in self.runs]

    @property
    def epochs(self) -> str:
        """How many epochs were run."""
        return "/".join(str(epochs) for epochs in sorted({run.summary.epochs for run in self.runs}))

    def values(self, metric: str = LAST) -> dict[int, float]:
        """Accuracy by seed, in percent; ``metric`` is :data:`LAST` or :data:`BEST`."""
        return {run.summary.seed: getattr(run.summary, metric) for run in self.runs}

    def mean(self, metric: str = LAST) -> float:
        """Mean over the seeds, in percent."""
        return mean(self.values(metric).values())

    def std(self, metric: str = LAST) -> float | None:
        """Sample standard deviation over the seeds (n - 1); None of a single one."""
        return stdev(self.values(metric).values()) if self.n > 1 else None

    def spread(self, metric: str = LAST) -> str:
        """Both as text, ``60.12 ± 0.34``."""
        return mean_and_std(self.mean(metric), self.std(metric))

    def recipe(self, *, with_teacher: bool = True) -> dict[str, str]:
        """Its settings but for the loss's own: where these are equal, two methods can be compared.

        Args:
            with_teacher: whether the teacher counts.
        """
        left_out = ("loss", "recipe.warmup_epochs", *(() if with_teacher else _WITHOUT_TEACHER))
        return _without(self.settings, left_out)


@dataclass(frozen=True)
class Section:
    """What was measured about a pair on one split; or, without a teacher, about one network.

    Args:
        dataset: name of the data set.
        split: what accuracy was measured on, such as ``the test split``.
        teacher: the teacher's network; None of a single network.
        student: the student's.
        rows: the student alone first, then kd, then the others, the best first.
        teachers: runs that trained the teacher, those whose folder its weights are from.
    """

    dataset: str
    split: str
    teacher: str | None
    student: str
    rows: tuple[Row, ...]
    teachers: tuple[Row, ...] = ()

    @property
    def title(self) -> str:
        """Teacher and student."""
        return f"{self.teacher} → {self.student}" if self.teacher else self.student

    @property
    def on_test(self) -> bool:
        """Whether this is the test split, which published numbers are about."""
        return self.split == TEST_SPLIT

    @property
    def teacher_top1(self) -> dict[str, float]:
        """Each teacher's own accuracy, in percent, by its weights, as its students' runs have measured it."""
        measured = defaultdict(list)
        for run in (run for row in self.rows for run in row.runs):
            if run.summary.teacher_top1 is not None:
                measured[run.settings["model.teacher.weights"]].append(run.summary.teacher_top1)
        return {weights: mean(values) for weights, values in measured.items()}

    def baselines(self, row: Row, method: str) -> list[Row]:
        """The rows of ``ce`` or ``kd`` with the same recipe, the plain ones: standardized logits are another method."""
        with_teacher = method != "ce"
        recipe = row.recipe(with_teacher=with_teacher)
        return [
            other
            for other in self.rows
            if other.method == method != row.method
            and other.recipe(with_teacher=with_teacher) == recipe
            and (method.endswith("_ls") or other.settings.get("loss.logit_standardization") != "True")
        ]

    def baseline(self, row: Row, method: str, metric: str = LAST) -> Row | None:
        """Of :meth:`baselines` the one with the most seeds in common; of those the strongest."""
        seeds = set(row.seeds)
        found = self.baselines(row, method)
        return max(found, key=lambda other: (len(seeds & set(other.seeds)), other.mean(metric)), default=None)

    def gain(self, row: Row, method: str, metric: str = LAST) -> PairedDifference | None:
        """How much a row is ahead of its :meth:`baseline`, over the seeds in common."""
        base = self.baseline(row, method, metric)
        return paired_difference(row.values(metric), base.values(metric)) if base else None


@dataclass(frozen=True)
class Comparison:
    """Two rows with the same recipe, compared seed by seed.

    Args:
        first: the row that is ahead if the difference is positive.
        second: the other one.
        difference: what the test says.
        p_holm: its p, corrected for all comparisons of the section.
    """

    first: Row
    second: Row
    difference: PairedDifference
    p_holm: float | None

    @property
    def verdict(self) -> str:
        """In words, at the level of 5 %."""
        if self.p_holm is None:
            return self.difference.reason
        if self.p_holm >= 0.05:
            return "not significant"
        return "ahead" if self.difference.mean > 0 else "behind"


def compare(section: Section, metric: str = LAST) -> list[Comparison]:
    """Every row against ``ce`` and ``kd``, and ``rld`` with enough seeds against every row, with the same recipe.

    The p values are corrected for all comparisons of this list that have one.
    """
    pairs: dict[frozenset[int], tuple[Row, Row]] = {}
    order = {"ce": 0, "kd": 1, "rld": 3}
    rows = sorted(section.rows, key=lambda row: (-order.get(row.method, 2), -row.mean()))
    for i, first in enumerate(rows):
        for second in rows[i + 1 :]:
            wanted = second.method in ("ce", "kd") or (first.method == "rld" and first.n >= MIN_PAIRS)
            with_teacher = "ce" not in (first.method, second.method)
            if wanted and first.recipe(with_teacher=with_teacher) == second.recipe(with_teacher=with_teacher):
                pairs.setdefault(frozenset((id(first), id(second))), (first, second))
    differences = [paired_difference(first.values(metric), second.values(metric)) for first, second in pairs.values()]
    corrected = holm([difference.p for difference in differences])
    return [Comparison(*pair, *found) for pair, *found in zip(pairs.values(), differences, corrected, strict=True)]


def sections(runs: Sequence[Run]) -> tuple[list[Section], list[tuple[Run, str]]]:
    """Sorts finished runs into results tables.

    Cross-entropy looks at no teacher: such runs stand in the table of each pair with their student, and in those of the
    pairs whose teacher they have trained.

    Args:
        runs: as :func:`~rld_lightning.runs.finished.find_runs` gives them.

    Returns:
        one section a pair and split, the test split first; and the runs that do not count, each with the reason.
    """
    rows, left_out = _one_a_seed(runs)
    pairs = {
        (run.summary.dataset, run.summary.validated_on, _network(run, "teacher"), _network(run, "student"))
        for row in rows
        for run in row.runs
        if run.config["model"].get("teacher")
    }
    found = [_section(*pair, rows) for pair in pairs]
    shown = {run.folder for section in found for row in (*section.rows, *section.teachers) for run in row.runs}
    alone = {
        (row.dataset, row.runs[0].summary.validated_on, None, row.student)
        for row in rows
        if any(run.folder not in shown for run in row.runs)
    }
    found += [_section(*single, rows) for single in alone]
    found.sort(key=lambda s: (not s.on_test, s.dataset, s.split, s.teacher is None, s.teacher or "", s.student))
    return found, left_out


def _section(dataset: str, split: str, teacher: str | None, student: str, rows: Sequence[Row]) -> Section:
    here = [row for row in rows if (row.dataset, row.runs[0].summary.validated_on) == (dataset, split)]
    own = [row for row in here if row.student == student and row.teacher in (None, teacher)]
    homes = {folder for row in own if row.teacher for run in row.runs for folder in _teacher_folders(run)}
    teachers = [
        replace(row, runs=trained)
        for row in here
        if row.student == teacher and row.teacher is None
        if (trained := tuple(run for run in row.runs if homes & {run.folder.resolve(), Path(run.summary.run)}))
    ]
    place = {"ce": 0, "kd": 1}
    own.sort(key=lambda row: (place.get(row.method, 2), -row.mean()))
    return Section(dataset, split, teacher, student, tuple(_label(own)), tuple(_label(teachers)))


def _label(rows: Sequence[Row]) -> list[Row]:
    """Names what tells rows of one method apart, and recipes that are not the same throughout, epochs aside."""
    shared = distinguishing([row.recipe(with_teacher=False) for row in rows], known=[row.epochs for row in rows])
    by_method = defaultdict(list)
    for row in rows:
        by_method[row.method].append(row)
    own = {method: distinguishing([row.settings for row in same]) for method, same in by_method.items()}
    labelled, taken = [], defaultdict(int)
    for row in rows:
        label = describe(row.settings, [*own[row.method], *shared])
        taken[row.method, label] += 1
        again = taken[row.method, label]  # values may look the same when they are shortened
        labelled.append(replace(row, label=f"{label} #{again}".strip() if again > 1 else label))
    return labelled


def _one_a_seed(runs: Sequence[Run]) -> tuple[list[Row], list[tuple[Run, str]]]:
    """Groups repetitions; of runs with the same seed the one that was finished last counts."""
    groups: dict[Hashable, dict[int, Run]] = defaultdict(dict)
    known: dict[Hashable, dict[str, str]] = {}
    left_out = []
    for run, settings in sorted(zip(runs, trained_with(runs), strict=True), key=lambda pair: _finished(pair[0])):
        if not math.isfinite(run.summary.top1):
            left_out.append((run, "its accuracy is not a number"))
            continue
        networks = (_network(run, "student"), _network(run, "teacher") if run.summary.teacher else None)
        key = (run.summary.dataset, run.summary.validated_on, *networks, run.method, frozenset(settings.items()))
        known[key] = settings
        if before := groups[key].get(run.summary.seed):
            left_out.append((before, f"repeated with the same settings and seed in {run.folder}"))
        groups[key][run.summary.seed] = run
    rows = [Row(tuple(group[seed] for seed in sorted(group)), known[key]) for key, group in groups.items()]
    return sorted(rows, key=lambda row: row.runs[0].folder), left_out


def _finished(run: Run) -> tuple[int, Path]:
    """When; the folder decides between copies of the same time."""
    return (run.folder / SUMMARY).stat().st_mtime_ns, run.folder


def _teacher_folders(run: Run) -> tuple[Path, Path]:
    """Where a run's teacher may have been trained: beside its weights, or by the run itself, which then stored it."""
    return Path(run.settings["model.teacher.weights"]).resolve().parent, run.folder.resolve() / "teacher"


def trained_with(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The settings of each run that have an effect on what it trains, but the seed.

    A setting that a run's peers do not know, because another version of this package wrote them, tells nothing apart;
    unless it was asked for on the command line.
    """
    own = [_without(run.settings, _NO_EFFECT if run.summary.teacher else _WITHOUT_TEACHER) for run in runs]
    peers = [{key: _peers(key, run, settings) for key in settings} for run, settings in zip(runs, own, strict=True)]
    size = Counter(group for groups in peers for group in set(groups.values()))
    knowing = Counter((key, group) for groups in peers for key, group in groups.items())
    return [
        {
            key: value
            for key, value in settings.items()
            if knowing[key, groups[key]] == size[groups[key]] or key in _asked_for(run)
        }
        for run, settings, groups in zip(runs, own, peers, strict=True)
    ]


def _peers(key: str, run: Run, settings: Mapping[str, str]) -> Hashable:
    """The runs that should know a key: of the same loss, with a teacher, with the same class, or on the data set."""
    if key.startswith("loss."):
        return run.summary.dataset, run.method
    if key.startswith("model.teacher."):
        return run.summary.dataset, "teacher"
    rooms = key.split(".")[:-1]
    for end in range(len(rooms), 0, -1):  # the milestones of one scheduler are nothing that another one has
        target = ".".join((*rooms[:end], "_target_"))
        if target in settings and target != key:
            return run.summary.dataset, target, settings[target]
    return run.summary.dataset, ""


def _asked_for(run: Run) -> set[str]:
    return {override.lstrip("+~").split("=")[0] for override in run.overrides}


def runs_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One line a run, for people who compute on: its names, its summary, its settings and its command."""
    lines = [
        {
            "dataset": run.summary.dataset, "split": run.summary.validated_on, "pair": run.pair, "method": run.method,
            "seed": run.summary.seed, "epochs": run.summary.epochs, "top1_last": run.summary.top1,
            "top1_best": run.summary.top1_best, "top5_last": run.summary.top5, "ce_last": run.summary.ce,
            "teacher": run.summary.teacher, "teacher_top1": run.summary.teacher_top1,
            "agreement": run.summary.agreement, "parameters": run.summary.parameters, "macs": run.summary.macs,
            "folder": str(run.folder), "overrides": " ".join(run.overrides),
        }
        for run in runs
    ]  # fmt: skip
    return pd.DataFrame(lines)


def _network(run: Run, role: str) -> str:
    return run.config["model"][role]["name"]


def _without(settings: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    starts = tuple(f"{name}." for name in names)
    return {key: value for key, value in settings.items() if not f"{key}.".startswith(starts)}
