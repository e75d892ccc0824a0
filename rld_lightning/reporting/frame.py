"""Finished runs as one table with a line per run; results, sweeps, CSV files and figures group its lines."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from rld_lightning.atomic_files import write_whole
from rld_lightning.errors import printable
from rld_lightning.runs.files import SUMMARY, plain_cell
from rld_lightning.runs.finished import Found, Run, find_all

LAST, BEST = "top1_last", "top1_best"
# The columns that are written as CSV.
RUN_COLUMNS = (
    *("dataset", "split", "pair", "method", "seed", "epochs", LAST, BEST, "top5_last", "ce_last"),
    *("teacher", "teacher_top1", "agreement", "parameters", "macs", "folder", "overrides"),
    *("complete", "images", "split_images", "steps", "scheduled_steps"),
)
# Config groups that write only into their own part of the config, or into none that matters; others may write anywhere.
_GROUPS = ("data", "model", "loss", "recipe", "trainer", "callbacks", "logger", "paths", "sweep", "launcher")
# Settings that do not affect training.
_NO_EFFECT = ("model.label", "model.tuned", "model.teacher.published_url", "loss._target_")
_TEACHER_SETTINGS = ("model.teacher", "recipe.warmup_epochs", *_NO_EFFECT)


def read_frame(folders: Sequence[Path]) -> tuple[pd.DataFrame, Found]:
    """:func:`runs_frame` of the finished runs in and below some folders, and the unfinished and broken ones.

    Raises:
        FileNotFoundError: a folder does not exist.
    """
    found = find_all(folders)
    return runs_frame(found.runs), found


def runs_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Finished runs as a table, one line per run, in their order.

    The columns are :data:`RUN_COLUMNS` (accuracy in percent, ``split`` in words, ``teacher`` missing for cross-entropy,
    ``complete`` false if trained or evaluated in part), ``student``, ``network`` (the trained network; SimKD's ends in
    the teacher's classifier), ``pair_teacher`` (the pair's teacher, used or not), ``on_test`` (measured on the whole
    test split), ``held_out`` (on another split), ``settings`` (those with an effect, as a mapping), ``setting`` (the
    same as one text), ``unshared`` (as one text, those ignored because not all peers of the run have them),
    ``finished`` (when), ``run`` and its ``data_seed``.
    """
    lines = []
    for run, (settings, unshared) in zip(runs, effective_settings(runs), strict=True):
        summary = run.summary
        lines.append(
            {
                "dataset": summary.dataset, "split": summary.validated_on, "pair": run.pair, "method": run.method,
                "seed": summary.seed, "epochs": summary.epochs, LAST: summary.top1, BEST: summary.top1_best,
                "top5_last": summary.top5, "ce_last": summary.ce, "teacher": summary.teacher,
                "teacher_top1": summary.teacher_top1, "agreement": summary.agreement,
                "parameters": summary.parameters, "macs": summary.macs, "folder": str(run.folder),
                "overrides": " ".join(run.overrides), "complete": summary.complete, "images": summary.images,
                "split_images": summary.split_images, "steps": summary.steps,
                "scheduled_steps": summary.scheduled_steps, "student": run.config["model"]["student"]["name"],
                "network": summary.model, "pair_teacher": (run.config["model"].get("teacher") or {}).get("name"),
                "on_test": summary.split == "test" and summary.evaluated_whole,
                "held_out": summary.split != "test", "settings": settings, "setting": as_text(settings),
                "unshared": as_text(unshared),
                "finished": (run.folder / SUMMARY).stat().st_mtime_ns, "run": run, "data_seed": summary.data_seed,
            }
        )  # fmt: skip
    frame = pd.DataFrame(lines)
    return frame.astype({"scheduled_steps": "Int64"}) if lines else frame  # missing where not known


def as_text(settings: Mapping[str, str]) -> str:
    """Settings as text, equal for equal settings."""
    return "\n".join(f"{key}={value}" for key, value in sorted(settings.items()))


def pool_seeds(runs: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Averages finished runs over seeds, best first; of runs with equal keys and seed, the last finished counts.

    Returns:
        one line per setting: the keys; ``mean`` and ``std`` (n - 1; missing for a single seed) of the last epoch's
        top-1, in percent, of ``n`` seeds; ``best``, the mean of the best epochs; ``epochs``, the maximum; ``run``, one
        of them.
    """
    latest = runs.sort_values("finished", kind="stable").groupby([*keys, "seed"], sort=False, dropna=False).tail(1)
    runs = runs.loc[runs.index.isin(latest.index)]
    groups = runs.groupby(list(keys), sort=False, dropna=False)
    pooled = groups.agg(
        mean=(LAST, "mean"), std=(LAST, "std"), n=(LAST, "size"), best=(BEST, "mean"),
        epochs=("epochs", "max"), run=("run", "first"),
    )  # fmt: skip
    return pooled.reset_index().sort_values("mean", ascending=False, kind="stable", ignore_index=True)


def write_csv(table: pd.DataFrame, path: Path) -> Path:
    """Writes a table as CSV, with texts escaped so that no spreadsheet reads them as formulas or new lines."""
    write_whole(path, printable(table.map(plain_cell).to_csv(index=False)).encode())
    return path


def recipe(settings: Mapping[str, str], *, with_teacher: bool) -> dict[str, str]:
    """The settings without the loss's: two methods can be compared if these are equal."""
    return without_keys(settings, ("loss", "recipe.warmup_epochs", *(() if with_teacher else _TEACHER_SETTINGS)))


def effective_settings(runs: Sequence[Run]) -> list[tuple[dict[str, str], dict[str, str]]]:
    """The settings of each run that affect its training, without the seed.

    A setting that some peers of a run lack, because another version of this package wrote them, is ignored, unless it
    was set on the command line. (Peers have chosen the same options, so an option can always add its settings.)

    Returns:
        for each run the settings that count, and those ignored because not all of its peers have them.
    """
    all_settings = [
        without_keys(run.settings, _NO_EFFECT if run.summary.teacher else _TEACHER_SETTINGS) for run in runs
    ]
    peers = [
        {key: _peer_group(key, run, settings) for key in settings}
        for run, settings in zip(runs, all_settings, strict=True)
    ]
    size = Counter(group for groups in peers for group in set(groups.values()))
    having = Counter((key, group) for groups in peers for key, group in groups.items())
    results = []
    for run, settings, groups in zip(runs, all_settings, peers, strict=True):
        overridden = tuple(f"{key}." for key in _overridden_keys(run))
        counted = {
            key: value
            for key, value in settings.items()
            if f"{key}.".startswith(overridden) or having[key, groups[key]] == size[groups[key]]
        }
        results.append((counted, {key: value for key, value in settings.items() if key not in counted}))
    return results


def _overridden_keys(run: Run) -> list[str]:
    """The keys set on the command line, without choices of options such as ``loss=rld``."""
    keys = [override.lstrip("+~").split("=")[0] for override in run.overrides]
    return [key for key in keys if key not in run.choices]


def _possible_sources(key: str, run: Run) -> tuple[tuple[str, str], ...]:
    """The chosen options that may have set a key: those of its part of the config, and an experiment."""
    part = key.split(".")[0]
    sources = []
    for group, option in run.choices.items():
        name, _, package = group.partition("@")
        anywhere = package == "_global_" or (not package and name not in _GROUPS and not name.startswith("hydra/"))
        if option is not None and (anywhere or (package or name).split(".")[0] == part):
            sources.append((group, str(option)))
    return tuple(sorted(sources))


def _peer_group(key: str, run: Run, settings: Mapping[str, str]) -> Hashable:
    """The group of runs that should all have a key: same data set and options, and same loss, teacher or class."""
    where = run.summary.dataset, _possible_sources(key, run)
    if key.startswith("loss."):
        return *where, run.method
    if key.startswith("model.teacher."):
        return *where, "teacher"
    parts = key.split(".")[:-1]
    for end in range(len(parts), 0, -1):  # a scheduler's milestones are expected of the same class only
        target = ".".join((*parts[:end], "_target_"))
        if target in settings and target != key:
            return *where, target, settings[target]
    return *where, ""


def without_keys(settings: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The settings without some keys and all keys below them."""
    starts = tuple(f"{name}." for name in names)
    return {key: value for key, value in settings.items() if not f"{key}.".startswith(starts)}
