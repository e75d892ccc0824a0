"""Sweeps as tables and heat maps: what each setting came to on the images held out for tuning."""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rld_lightning.reporting.frame import pool_seeds, runs_frame
from rld_lightning.reporting.labels import differing, short_key, short_value
from rld_lightning.reporting.tables import TEST_SPLIT, trained_with
from rld_lightning.runs.files import SWEEP, TEACHER
from rld_lightning.runs.finished import Run, find_runs

if TYPE_CHECKING:
    import optuna

# The axes of heat maps, where these are swept: across, down, and one map each.
_FAVOURITES = ("loss.alpha", "loss.beta", "loss.temperature")
MAX_GRID = 20  # values of a key, beyond which trials are points and not cells


def sweep_settings(folder: Path, swept: Collection[str]) -> pd.DataFrame:
    """The settings that a sweep has tried to the end, the best first.

    Args:
        folder: the sweep's.
        swept: the keys that it sweeps; ``seed`` makes repetitions of a setting.

    Returns:
        as :func:`~rld_lightning.reporting.frame.pool_seeds` by ``overrides``: those of ``swept`` but the seed's, as
        written, in the order of ``swept``; empty if no trial has finished.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    runs, chosen = [], []
    for run in find_runs([folder]):
        overrides = parser.parse_overrides(run.overrides)
        lines = {override.get_key_element().lstrip("+~"): override.input_line for override in overrides}
        above = [path for path in (run.folder, *run.folder.parents) if folder in path.parents]
        within = any((path / SWEEP).exists() for path in above)  # another sweep
        if not within and run.folder != folder / TEACHER and set(swept) <= set(lines) and isfinite(run.summary.top1):
            runs.append(run)
            chosen.append(tuple(lines[key] for key in swept if key != "seed"))
    return pool_seeds(runs_frame(runs).assign(overrides=chosen), ["overrides"]) if runs else pd.DataFrame()


@dataclass(frozen=True)
class FinishedSweep:
    """The finished trials of one sweep with one loss on one pair.

    Args:
        folder: the sweep's.
        runs: its trials; those that differ in their seed only are repetitions.
    """

    folder: Path
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        """Folder, method and pair."""
        return f"{self.folder.name}: {self.runs[0].method}, {self.runs[0].pair}, {self.runs[0].summary.dataset}"

    @property
    def split(self) -> str:
        """What the trials were measured on."""
        return self.runs[0].summary.validated_on

    @property
    def held_out(self) -> bool:
        """Whether that is something else than the test split, as it should be for tuning."""
        return self.split != TEST_SPLIT

    @property
    def study(self) -> Path | None:
        """Optuna's study, if it was Optuna that chose the values."""
        path = self.folder / "study.db"
        return path if path.exists() else None

    @cached_property
    def _settings(self) -> list[dict[str, str]]:
        return trained_with(self.runs)

    @cached_property
    def keys(self) -> list[str]:
        """The keys that were swept, the loss's first; one that follows another is left out."""
        settings = self._settings
        keys: dict[tuple, str] = {}
        for key in differing(settings):
            keys.setdefault(tuple(values.get(key) for values in settings), key)
        return list(keys.values())

    @cached_property
    def trials(self) -> pd.DataFrame:
        """One line a setting, the best first: its values, ``mean``, ``std`` (n - 1), ``n`` and ``best`` epoch, in %."""
        lines = pd.DataFrame(
            [
                {key: _number(settings.get(key, "-")) for key in self.keys}
                | {"top1": run.summary.top1, "best": run.summary.top1_best}
                for run, settings in zip(self.runs, self._settings, strict=True)
            ]
        )
        groups = lines.groupby(self.keys, sort=False, dropna=False)
        table = groups.agg(mean=("top1", "mean"), std=("top1", "std"), n=("top1", "size"), best=("best", "mean"))
        return table.reset_index().sort_values("mean", ascending=False, ignore_index=True)


@dataclass(frozen=True)
class HeatMap:
    """Mean accuracy over a grid of two keys.

    Args:
        title: the value of a third key, such as ``temperature=4``; empty without one.
        x_key: key of the columns.
        y_key: key of the rows; empty where only one key was swept.
        x: its values, in order.
        y: its values, in order.
        cells: in percent, (rows, columns); NaN where nothing was run.
    """

    title: str
    x_key: str
    y_key: str
    x: tuple
    y: tuple
    cells: NDArray[np.float64]


def split_sweeps(runs: Sequence[Run]) -> tuple[list[FinishedSweep], list[Run]]:
    """Tells the trials of sweeps from other runs.

    Trials that were tuned on held-out images belong to no results table. A sweep that validated on the test split
    (over losses and seeds, say) is one of both: its runs stand in results tables as well.

    Returns:
        the sweeps; and the runs for the results tables, with trials whose accuracy is not a number, which no table
        counts and :func:`~rld_lightning.reporting.tables.sections` names.
    """
    groups: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        if isfinite(run.summary.top1) and (folder := _sweep_folder(run)):
            groups[(folder, run.summary.dataset, run.summary.validated_on, run.pair, run.method)].append(run)
    sweeps = [FinishedSweep(key[0], tuple(group)) for key, group in groups.items()]
    sweeps = [sweep for sweep in sweeps if sweep.keys]
    tuned = {run.folder for sweep in sweeps if sweep.held_out for run in sweep.runs}
    return sweeps, [run for run in runs if run.folder not in tuned]


def heat_maps(sweep: FinishedSweep) -> list[HeatMap]:
    """One map for each value of the third key, if three are swept; empty where the values are no grid.

    With more than three swept keys a cell is the best over the others.
    """
    trials = sweep.trials
    x_key, y_key, panel_key = _axes(sweep)
    axes = [key for key in (x_key, y_key, panel_key) if key]
    if trials[axes].nunique().max() > MAX_GRID:
        return []
    cells = trials.groupby(axes)["mean"].max()
    if len(cells) < 0.25 * np.prod([trials[key].nunique() for key in axes]):
        return []
    x, y, panels = (_ordered(trials[key]) if key else (None,) for key in (x_key, y_key, panel_key))
    maps = []
    for panel in panels:
        values = np.full((len(y), len(x)), np.nan)
        for row, column in np.ndindex(values.shape):
            place = [v for v, key in ((x[column], x_key), (y[row], y_key), (panel, panel_key)) if key]
            values[row, column] = cells.get(tuple(place) if len(place) > 1 else place[0], np.nan)
        title = f"{short_key(panel_key)} = {short_value(panel)}" if panel_key else ""
        maps.append(HeatMap(title, x_key, y_key or "", x, y, values))
    return maps


def importances(study: Path) -> tuple[dict[str, float], str]:
    """How much of the spread of the trials each parameter explains, by Optuna.

    Returns:
        shares by parameter, the largest first, which sum to 1; and one sentence on how, or why there are none.
    """
    try:
        import optuna
    except ImportError:
        return {}, 'Optuna is not here to read the study: pip install "rld-lightning[sweep]" for its importance plot.'
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:  # the study is only read, even where it lies read-only
        for file in study.parent.glob(f"{study.name}*"):
            shutil.copy(file, scratch)
        storage = f"sqlite:///{scratch}/{study.name}"
        try:
            name = optuna.get_all_study_summaries(storage=storage)[0].study_name
            loaded = optuna.load_study(study_name=name, storage=storage)
            complete = [trial for trial in loaded.trials if trial.state == optuna.trial.TrialState.COMPLETE]
            if len(complete) < 4:
                return {}, f"{len(complete)} trials of the study are complete, too few to tell importances from."
            found, how = _evaluate(loaded)
        except Exception as error:  # a study of another version, or that nothing can be learned from
            return {}, f"Optuna can tell no importances from {study}: {error}"
    return {key: float(value) for key, value in found.items()}, f"{how} over {len(complete)} complete trials"


def _evaluate(study: "optuna.Study") -> tuple[dict[str, float], str]:
    """Importances by fANOVA; where Optuna 2, which Hydra's sweeper wants, trips over NumPy 2.4, by impurity."""
    from optuna import importance

    try:
        evaluator = importance.FanovaImportanceEvaluator(seed=0)
        return importance.get_param_importances(study, evaluator=evaluator), "fANOVA"
    except ValueError:
        evaluator = importance.MeanDecreaseImpurityImportanceEvaluator(seed=0)
        return importance.get_param_importances(study, evaluator=evaluator), "mean decrease of impurity"


def _sweep_folder(run: Run) -> Path | None:
    """The folder of the sweep that a run is a trial of: Hydra leaves ``multirun.yaml`` there."""
    for folder in list(run.folder.parents)[:4]:
        if (folder / "multirun.yaml").exists() or (folder / "study.db").exists() or folder.parent.name == "sweeps":
            return folder
        if (folder / "config.yaml").exists():  # a teacher that was trained for a run
            return None
    return None


def _axes(sweep: FinishedSweep) -> tuple[str, str | None, str | None]:
    """The keys across, down and for the maps: those of RLD where they are swept, else those with the most values."""
    favourites = [key for key in _FAVOURITES if key in sweep.keys]
    others = sorted((key for key in sweep.keys if key not in favourites), key=lambda k: -sweep.trials[k].nunique())
    return (*favourites, *others, None, None)[:3]


def _ordered(values: pd.Series) -> tuple:
    return tuple(sorted(values.unique(), key=lambda v: (isinstance(v, str), v)))


def _number(value: str) -> float | int | str:
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else number
