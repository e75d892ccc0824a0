"""Results tables: the runs of one pair on one split, one row per setting, averaged over seeds."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from rld_lightning.reporting.frame import BEST, LAST, as_text, recipe
from rld_lightning.reporting.labels import describe, distinguishing
from rld_lightning.reporting.significance import MIN_PAIRS, PairedDifference, holm, paired_difference
from rld_lightning.runs.files import TEACHER

# Columns that are equal within a row: its runs differ in the seed only.
_ROW_KEYS = ["dataset", "split", "student", "teacher", "method", "setting"]


@dataclass(frozen=True, eq=False)
class Section:
    """The measurements of a pair on one split; without a teacher, of one network."""

    dataset: str  # name of the data set
    split: str  # the images that accuracy was measured on, in words, such as `the test split`
    on_test: bool  # whether this is the whole test split, as for published numbers
    teacher: str | None  # the teacher's network; None for a single network
    student: str  # the student's network
    # Lines of `runs_frame`, with the `name` and `label` of their row, those of the best row first
    runs: pd.DataFrame
    teacher_runs: pd.DataFrame  # the same for the runs that trained the teacher's weights

    @property
    def title(self) -> str:
        """Teacher and student."""
        return f"{self.teacher} → {self.student}" if self.teacher else self.student

    @cached_property
    def rows(self) -> pd.DataFrame:
        """:func:`rows_of` the runs."""
        return rows_of(self.runs)

    @property
    def teacher_top1(self) -> dict[str, float]:
        """Each teacher's accuracy, in percent, by its weights, as measured by its students' runs."""
        measured = self.runs.dropna(subset="teacher_top1")
        weights = measured["settings"].map(lambda settings: settings["model.teacher.weights"])
        return measured.groupby(weights, sort=False)["teacher_top1"].mean().to_dict()

    def baselines(self, name: str, method: str) -> pd.DataFrame:
        """The rows of plain ``ce`` or ``kd`` with the same recipe; standardized logits are another method."""
        rows = self.rows
        recipe = "recipe_alone" if method == "ce" else "recipe"
        same = (rows["method"] == method) & (rows[recipe] == rows.at[name, recipe])
        if not method.endswith("_ls"):
            same &= rows["settings"].map(lambda settings: settings.get("loss.logit_standardization") != "True")
        return rows[same] if rows.at[name, "method"] != method else rows[:0]

    def baseline(self, name: str, method: str, metric: str = LAST) -> str | None:
        """The one of :meth:`baselines` with the most seeds in common; among several, the most accurate."""
        rows, seeds = self.baselines(name, method), set(self.rows.at[name, "seeds"])
        return max(
            rows.index,
            key=lambda other: (len(seeds & set(rows.at[other, "seeds"])), rows.at[other, f"{metric}_mean"]),
            default=None,
        )

    def gain(self, name: str, method: str, metric: str = LAST) -> PairedDifference | None:
        """A row's gain over its :meth:`baseline`, over the seeds in common."""
        base = self.baseline(name, method, metric)
        return self.difference(name, base, metric) if base else None

    def difference(self, first: str, second: str, metric: str = LAST) -> PairedDifference:
        """A row's gain over another, seed by seed."""
        return paired_difference(self.values(first, metric), self.values(second, metric))

    def values(self, name: str, metric: str = LAST) -> pd.Series:
        """A row's accuracy by seed, in percent; ``metric`` is ``top1_last`` or ``top1_best``."""
        return self.runs[self.runs["name"] == name].set_index("seed")[metric]


def rows_of(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of a results table, by name.

    Returns:
        ``method``, ``label`` (how it differs from other rows of its method), ``n``, ``seeds`` and ``epochs``;
        ``top1_last_mean``, ``top1_last_std`` (n - 1; missing for a single seed) and ``top1_best_...`` in
        percent; ``settings``; two texts, equal for rows that can be compared: ``recipe`` (settings without the loss's)
        and ``recipe_alone`` (nor the teacher's); ``network`` and the list ``runs``.
    """
    rows = runs.groupby("name", sort=False).agg(
        method=("method", "first"), label=("label", "first"), n=("seed", "size"), seeds=("seed", list),
        epochs=("epochs", lambda epochs: "/".join(map(str, sorted(set(epochs))))), distilled=("teacher", "count"),
        top1_last_mean=(LAST, "mean"), top1_last_std=(LAST, "std"),
        top1_best_mean=(BEST, "mean"), top1_best_std=(BEST, "std"),
        settings=("settings", "first"), network=("network", "first"), runs=("run", list),
    )  # fmt: skip
    rows["distilled"] = rows["distilled"] > 0
    rows["recipe"] = [as_text(recipe(settings, with_teacher=True)) for settings in rows["settings"]]
    rows["recipe_alone"] = [as_text(recipe(settings, with_teacher=False)) for settings in rows["settings"]]
    return rows


def not_shared(unshared: Sequence[str]) -> str:
    """The settings that some runs have and others lack, such as ``recipe.option=3``; empty if none."""
    counts = Counter(line for lines in unshared for line in set(lines.splitlines()))
    return ", ".join(sorted(line for line, count in counts.items() if count < len(unshared)))


def compare(section: Section, metric: str = LAST) -> pd.DataFrame:
    """Compares every row with ``ce`` and ``kd``, and ``rld`` with enough seeds with every row, within a recipe.

    Returns:
        one line per comparison: the names ``first`` and ``second``, ``n`` seeds in common, mean ``difference`` with
        ``ci95_low`` and ``ci95_high`` in percentage points, ``p``, ``p_holm`` (corrected for all comparisons that have
        a p) and the ``verdict`` at 5 %, or why there is none.
    """
    order = {"ce": 0, "kd": 1, "rld": 3}
    place = section.rows["method"].map(lambda method: order.get(method, 2))
    rows = section.rows.assign(place=place).sort_values(["place", f"{LAST}_mean"], ascending=False, kind="stable")
    lines = []
    for i, first in enumerate(rows.index):
        one = rows.loc[first]
        for second in rows.index[i + 1 :]:
            other = rows.loc[second]
            wanted = other["method"] in ("ce", "kd") or (one["method"] == "rld" and one["n"] >= MIN_PAIRS)
            recipe = "recipe_alone" if "ce" in (one["method"], other["method"]) else "recipe"
            if wanted and one[recipe] == other[recipe]:
                gain = section.difference(first, second, metric)
                lines.append((first, second, gain.n, gain.mean, gain.low, gain.high, gain.p, gain.reason))
    columns = ["first", "second", "n", "difference", "ci95_low", "ci95_high", "p", "reason"]
    table = pd.DataFrame(lines, columns=columns)
    table["p_holm"] = holm(table["p"])
    table["verdict"] = [_verdict(*line) for line in table[["difference", "p_holm", "reason"]].itertuples(index=False)]
    return table.drop(columns="reason")


def _verdict(difference: float, p: float | None, reason: str) -> str:
    if p is None or pd.isna(p):
        return reason
    if p >= 0.05:
        return "not significant"
    return "ahead" if difference > 0 else "behind"


def sections(frame: pd.DataFrame) -> tuple[list[Section], list[tuple[str, str]]]:
    """Groups finished runs into results tables; runs that were trained or evaluated in part are in none.

    Cross-entropy uses no teacher: its runs are in the table of each pair with their student, and of each pair whose
    teacher they trained.

    Returns:
        one section per pair and split, the test split first; and the directories of runs that do not count, with the
        reason.
    """
    if frame.empty or not frame["complete"].any():
        return [], []
    frame = frame[frame["complete"]]
    counted, left_out = _latest_per_seed(frame)
    where = ["dataset", "split", "on_test"]
    pairs = counted.dropna(subset="pair_teacher")[[*where, "pair_teacher", "student"]].drop_duplicates()
    all_sections = [_section(counted, *pair) for pair in pairs.to_numpy().tolist()]
    shown = {line for section in all_sections for part in (section.runs, section.teacher_runs) for line in part.index}
    alone = counted[~counted.index.isin(shown)][[*where, "student"]].drop_duplicates()
    all_sections += [
        _section(counted, dataset, split, on_test, None, student)
        for dataset, split, on_test, student in alone.to_numpy().tolist()
    ]
    all_sections.sort(key=lambda s: (not s.on_test, s.dataset, s.split, s.teacher is None, s.teacher or "", s.student))
    return all_sections, left_out


def choose_pair(runs: pd.DataFrame, pair: str | None) -> Section:
    """The section of one pair, preferably of the test split.

    Args:
        pair: such as ``resnet20_to_resnet8``; None if there is only one.

    Raises:
        ValueError: there is none, or more than one.
    """
    by_pair: dict[str, list[Section]] = {}
    for section in sections(runs)[0]:
        if section.teacher and section.rows["distilled"].any():
            by_pair.setdefault(f"{section.teacher}_to_{section.student}", []).append(section)
    names = ", ".join(by_pair)
    if not by_pair:
        in_part = sum(~runs["complete"]) if len(runs) else 0
        aside = f" ({in_part} that were trained or evaluated in part do not count)" if in_part else ""
        raise ValueError(
            f"there is no finished run with a teacher in these folders{aside}; train one first, such as loss=rld."
        )
    if pair is None and len(by_pair) > 1:
        raise ValueError(f"there are runs of several pairs; choose one with --pair: {names}.")
    if pair is not None and pair not in by_pair:
        raise ValueError(f"there is no finished run of --pair {pair}; there are runs of {names}.")
    candidates = by_pair[pair or names]
    data = {section.dataset for section in candidates}
    if len(data) > 1:
        raise ValueError(f"{names} was trained on {' and '.join(sorted(data))}; give the folders of one of them.")
    return candidates[0]


def _latest_per_seed(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Keeps the last finished of the runs with the same settings and seed; returns the others with the reason."""
    frame = frame.sort_values(["finished", "folder"])  # by folder for copies with the same time
    finite = np.isfinite(frame[LAST])
    later = frame[finite].groupby([*_ROW_KEYS, "seed"], dropna=False)["folder"].shift(-1)
    repeated = "repeated with the same settings and seed in " + later.dropna()
    unshared, data_seeds = (frame.set_index("folder")[name] for name in ("unshared", "data_seed"))
    for line, folder in later.dropna().items():
        if keys := not_shared([frame.at[line, "unshared"], unshared[folder]]):
            repeated[line] += f", though not both have {keys}"
        if frame.at[line, "data_seed"] != data_seeds[folder]:
            repeated[line] += ", though data.seed differs: only seed= distinguishes repetitions"
    reasons = pd.concat([frame[~finite]["folder"].map(lambda _: "its accuracy is not a number"), repeated])
    left_out = frame.loc[frame.index.isin(reasons.index), "folder"]
    return frame.drop(reasons.index), [(folder, reasons[line]) for line, folder in left_out.items()]


def _section(
    frame: pd.DataFrame, dataset: str, split: str, on_test: bool, teacher: str | None, student: str
) -> Section:
    here = frame[(frame["dataset"] == dataset) & (frame["split"] == split)]
    student_runs = here[(here["student"] == student) & (here["teacher"].isna() | (here["teacher"] == teacher))]
    # Of possible training runs of the teacher: the weights' folder, or teacher/ in the student's run.
    teacher_folders: set[Path] = set()
    for run in student_runs[student_runs["teacher"].notna()]["run"]:
        teacher_folders |= {
            Path(run.settings["model.teacher.weights"]).resolve().parent,
            run.folder.resolve() / TEACHER,
        }
    trained = here["run"].map(lambda run: bool(teacher_folders & {run.folder.resolve(), Path(run.summary.run)}))
    teachers = here[(here["student"] == teacher) & here["teacher"].isna() & trained]
    return Section(dataset, split, on_test, teacher, student, _with_row_names(student_runs), _with_row_names(teachers))


def _with_row_names(runs: pd.DataFrame) -> pd.DataFrame:
    """Sorts runs by their rows, best first, and adds the rows' names.

    A label has the settings that distinguish rows of one method, and the recipe if it differs, apart from its epochs.
    """
    runs = runs.sort_values("seed", kind="stable")
    groups = [runs.loc[lines] for lines in runs.groupby(_ROW_KEYS, sort=False, dropna=False).groups.values()]
    groups.sort(key=lambda group: (-group[LAST].mean(), Path(group["folder"].iloc[0])))
    settings = [group["settings"].iloc[0] for group in groups]
    methods = [group["method"].iloc[0] for group in groups]
    epochs = [tuple(sorted(set(group["epochs"]))) for group in groups]
    shared = distinguishing([recipe(values, with_teacher=False) for values in settings], known=epochs)
    named: list[pd.DataFrame] = []
    taken: dict[str, int] = {}
    for group, values, method in zip(groups, settings, methods, strict=True):
        same = [other for other, its in zip(settings, methods, strict=True) if its == method]
        label = describe(values, [*distinguishing(same), *shared])
        name = f"{method} ({label})" if label else method
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:  # shortened values may be equal
            label = f"{label} #{taken[name]}".strip()
            name = f"{method} ({label})"
        named.append(group.assign(name=name, label=label))
    return pd.concat(named) if named else runs.assign(name="", label="")
