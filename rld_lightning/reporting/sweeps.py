"""Sweeps as tables and heat maps: each setting's accuracy on the images held out for tuning."""

import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import isfinite
from pathlib import Path

import numpy as np
import pandas as pd

from rld_lightning.errors import first_line, printable
from rld_lightning.reporting.frame import LAST, pool_seeds, runs_frame
from rld_lightning.reporting.labels import differing, short_key, short_value
from rld_lightning.runs.files import CONFIG, STUDY, SWEEPER
from rld_lightning.runs.finished import Run

_LARGEST = 1 << 30  # bytes of a study's file
_LONGEST = 200  # characters of a name or a reason in it
# Preferred axes of heat maps: columns, rows, and one map per value.
_PREFERRED_AXES = ("loss.alpha", "loss.beta", "loss.temperature")
MAX_GRID = 20  # values of a key; with more, trials are drawn as points, not cells


def sweep_settings(trials: Sequence[Run], swept: Collection[str]) -> pd.DataFrame:
    """The settings of a sweep's finished trials, best first.

    Args:
        swept: the keys that it sweeps; trials that differ in ``seed`` only are repetitions.

    Returns:
        :func:`~rld_lightning.reporting.frame.pool_seeds` by ``overrides`` (those of ``swept`` without the seed's, as
        written, in the order of ``swept``) and ``complete``. Runs without all of ``swept``, or whose accuracy is not a
        number, do not count; empty if none does.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    runs, chosen = [], []
    for run in trials:
        overrides = parser.parse_overrides(run.overrides)
        lines = {override.get_key_element().lstrip("+~"): override.input_line for override in overrides}
        if set(swept) <= set(lines) and isfinite(run.summary.top1):
            runs.append(run)
            chosen.append(tuple(lines[key] for key in swept if key != "seed"))
    return pool_seeds(runs_frame(runs).assign(overrides=chosen), ["overrides", "complete"]) if runs else pd.DataFrame()


def best_setting(settings: pd.DataFrame) -> int:
    """The index of the setting with the highest mean, among those trained to the end and with the most seeds.

    A single lucky run is not a mean: the other seeds of its setting may have failed.

    Args:
        settings: lines of :func:`~rld_lightning.reporting.frame.pool_seeds`; without ``complete``, all count.
    """
    if "complete" in settings and settings["complete"].any():
        settings = settings[settings["complete"]]
    return int(settings[settings["n"] == settings["n"].max()]["mean"].idxmax())


@dataclass(frozen=True, eq=False)
class Sweep:
    """The finished trials of one sweep with one loss on one pair."""

    folder: Path  # the sweep's folder
    runs: pd.DataFrame  # its trials, lines of `runs_frame`; those that differ in the seed only are repetitions

    @property
    def title(self) -> str:
        """Folder, method and pair."""
        first = self.runs.iloc[0]
        in_part = "" if self.complete else ", in part"
        return f"{self.folder.name}: {first['method']}, {first['pair']}, {first['dataset']}{in_part}"

    @property
    def complete(self) -> bool:
        """Whether its trials were trained to the end and evaluated on all images (the same for all trials)."""
        return bool(self.runs["complete"].iloc[0])

    @property
    def split(self) -> str:
        """The images that the trials were measured on, in words."""
        return self.runs["split"].iloc[0]

    @property
    def held_out(self) -> bool:
        """Whether the split is not the test split, as tuning requires."""
        return bool(self.runs["held_out"].iloc[0])

    @property
    def study(self) -> Path | None:
        """The file of Optuna's study, if Optuna chose the values."""
        path = self.folder / STUDY
        return path if path.exists() else None

    @cached_property
    def keys(self) -> list[str]:
        """The swept keys, the loss's first, without keys that only vary with an earlier one."""
        settings = list(self.runs["settings"])
        keys: dict[tuple[str | None, ...], str] = {}
        for key in differing(settings):
            keys.setdefault(tuple(own.get(key) for own in settings), key)
        return list(keys.values())

    @cached_property
    def trials(self) -> pd.DataFrame:
        """:func:`~rld_lightning.reporting.frame.pool_seeds` by the values of :attr:`keys`."""
        values = [{key: _number(own.get(key, "-")) for key in self.keys} for own in self.runs["settings"]]
        return pool_seeds(self.runs.join(pd.DataFrame(values, index=self.runs.index)), self.keys)


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Mean accuracy over a grid of two keys."""

    title: str  # the value of the third key, such as `temperature = 4`; empty without one
    keys: list[str]  # of the columns, the rows and the maps, as many as were swept
    # In percent; columns are the first key's values, rows the second's; NaN without a run
    cells: pd.DataFrame
    seeds: pd.DataFrame  # the number of seeds in each cell

    @property
    def x_key(self) -> str:
        """The key of the columns."""
        return self.keys[0]

    @property
    def y_key(self) -> str:
        """The key of the rows; empty if only one key was swept."""
        return self.keys[1] if len(self.keys) > 1 else ""


def split_sweeps(frame: pd.DataFrame) -> tuple[list[Sweep], pd.DataFrame]:
    """Separates the trials of sweeps from other runs.

    Trials on held-out images are in no results table. A sweep that validated on the test split (over losses and seeds,
    say) is in both. Trials in part form a separate sweep.

    Returns:
        the sweeps; and the runs for the results tables, including trials whose accuracy is not a number, which
        :func:`~rld_lightning.reporting.tables.sections` then lists as left out.
    """
    folders = frame["run"].map(_sweep_folder).where(np.isfinite(frame[LAST])).rename("sweep")
    groups = frame.groupby([folders, "dataset", "split", "pair", "method", "complete"], sort=False)
    sweeps = [Sweep(key[0], group) for key, group in groups]
    sweeps = [sweep for sweep in sweeps if sweep.keys]
    tuned = [line for sweep in sweeps if sweep.held_out for line in sweep.runs.index]
    return sweeps, frame.drop(tuned)


def heat_maps(sweep: Sweep) -> list[HeatMap]:
    """One map for each value of the third key, if three are swept; empty if the values form no grid.

    With more than three swept keys, each cell is the best over the others, of settings with the most seeds.
    """
    trials = sweep.trials.sort_values(["n", "mean"], ascending=False, kind="stable")
    preferred = [key for key in _PREFERRED_AXES if key in sweep.keys]
    others = sorted(set(sweep.keys) - set(preferred), key=lambda key: (-trials[key].nunique(), sweep.keys.index(key)))
    axes = [*preferred, *others][:3]
    counts = trials[axes].nunique()
    if counts.max() > MAX_GRID or len(trials[axes].drop_duplicates()) < 0.25 * counts.prod():
        return []
    x_key, y_key, panel_key = (*axes, "", "")[:3]
    maps = []
    for panel in _ordered(trials[panel_key]) if panel_key else [None]:
        panel_trials = trials[trials[panel_key] == panel] if panel_key else trials
        down = panel_trials[y_key] if y_key else pd.Series("", panel_trials.index)
        grid = panel_trials.pivot_table(values=["mean", "n"], index=down, columns=x_key, aggfunc="first")
        places = {"index": _ordered(trials[y_key]) if y_key else [""], "columns": _ordered(trials[x_key])}
        title = f"{short_key(panel_key)} = {short_value(panel)}" if panel_key else ""
        maps.append(HeatMap(title, axes, grid["mean"].reindex(**places), grid["n"].reindex(**places)))
    return maps


def importances(study: Path) -> tuple[dict[str, float], str]:
    """Optuna's importances: the share of the trials' variance that each parameter explains.

    Returns:
        shares by parameter, largest first and at most ``MAX_GRID`` of a sum of 1; and a sentence on the method, or why
            there are none.
    """
    from rld_lightning.hydra.sweeps.optuna_study import check_storage

    try:
        import optuna
    except ImportError:
        return {}, 'importances need Optuna, which is not installed: pip install "rld-lightning[sweep]".'
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:  # opening it may write, and its folder may be read-only
        storage = f"sqlite:///{scratch}/{study.name}"
        try:
            for file in study.parent.glob(f"{study.name}*"):
                if file.is_file() and file.stat().st_size <= _LARGEST:  # a device would fill the disk
                    shutil.copy(file, scratch)
            check_storage(storage)
            name = optuna.get_all_study_summaries(storage=storage)[0].study_name
            loaded = optuna.load_study(study_name=name, storage=storage)
            complete = [trial for trial in loaded.trials if trial.state == optuna.trial.TrialState.COMPLETE]
            if len(complete) < 4:
                return {}, f"{len(complete)} trials of the study are complete, too few to compute importances."
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            found = optuna.importance.get_param_importances(loaded, evaluator=evaluator)
            if not all(map(isfinite, found.values())):  # of results that are too large to square
                raise ValueError("they are not finite")
        except Exception as error:  # another version's study, or trials without information
            reason = printable(first_line(error))[:_LONGEST]
            return {}, f"Optuna cannot compute importances from {study}: {reason}"
    shares = {printable(key)[:_LONGEST]: float(value) for key, value in islice(found.items(), MAX_GRID)}
    return shares, f"fANOVA over {len(complete)} complete trials"


def _sweep_folder(run: Run) -> Path | None:
    """The folder of a trial's sweep, in which Hydra writes ``multirun.yaml``; None if the run is no trial."""
    for folder in list(run.folder.parents)[:4]:
        if (folder / SWEEPER).exists() or (folder / STUDY).exists() or folder.parent.name == "sweeps":
            return folder
        if (folder / CONFIG).exists():  # a teacher that was trained for another run
            return None
    return None


def _ordered(values: pd.Series) -> Sequence[float | str]:
    return sorted(values.unique(), key=lambda value: (isinstance(value, str), value))


def _number(value: str) -> float | int | str:
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else number
