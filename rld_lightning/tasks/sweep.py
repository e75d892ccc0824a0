"""A sweep from its first line to its last; in between, Hydra runs the trials (:mod:`rld_lightning.tasks.trial`)."""

import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rld_lightning.console import print_error, print_line, print_table
from rld_lightning.errors import UserError
from rld_lightning.hydra.compose import expand_combined_loss
from rld_lightning.hydra.script import exit_on_user_error
from rld_lightning.models.store import TeacherStore
from rld_lightning.reporting.labels import mean_and_std, short_value
from rld_lightning.runs.files import ERROR, SUMMARY, SWEEP
from rld_lightning.runs.finished import Run, find_runs
from rld_lightning.runs.folder import lock_folder
from rld_lightning.runs.likeness import canonical, decides
from rld_lightning.runs.naming import loss_name
from rld_lightning.tasks.start import train_teacher
from rld_lightning.tasks.teacher import teacher_config

HELD_OUT = "data.val_fraction"
TEACHER = "teacher"  # folder of the teacher that the trials share
INTERRUPTED = "interrupted"  # a trial of Optuna's that was tried again as another one


class Sweep(Callback):
    """What every sweep gets, whichever sweeper chooses the values and whichever launcher runs the trials.

    At its start: hyper-parameters are tuned on a held-out part of the training split, a trial's folder is named after
    the values that are swept, and an Optuna study in a storage goes on where it was. At its end: the trials in order,
    and the best setting with the command that trains with it on the whole split.

    Args:
        held_out: ``data.val_fraction`` of sweeps that do not say their own.
    """

    def __init__(self, held_out: float) -> None:
        self.held_out = held_out
        self._lock: FileLock | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock: launchers send callbacks along to the processes of trials."""
        return {**vars(self), "_lock": None}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Puts in what makes a sweep a clean one.

        Raises:
            SystemExit: the sweep is a mistake, or cannot start; with one sentence.
        """
        with _ends_the_sweep(config):
            self._begin(config)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints the trials, the best first, and how to train with its setting."""
        with _ends_the_sweep(config):
            _report(config, *_overrides(config))

    def _begin(self, config: DictConfig) -> None:
        folder = Path(config.hydra.sweep.dir)
        swept, fixed = _overrides(config)
        if set(swept) - {"seed", HELD_OUT} and HELD_OUT not in swept and not config.data.val_fraction:
            tuned = [key for key in swept if "." in key]
            if HELD_OUT not in fixed:
                _add(config, fixed, HELD_OUT, self.held_out)
            elif tuned:
                raise UserError(
                    f"{HELD_OUT}=0 would tune {', '.join(tuned)} on the test split; leave it away (a sweep holds out "
                    f"{self.held_out:g} of the training images), or give another share."
                )
        optuna = "max_failure_rate" in config.hydra.sweeper
        if optuna and "seed" in swept:
            raise UserError(
                "Optuna would choose the luckiest seed; sweep with one, then repeat the best setting with seed=0,1,2."
            )
        self._lock = lock_folder(folder, ".sweep.lock", "swept")  # until the process ends; trials have their own
        _same_sweep(folder, swept, fixed, values_too=optuna)
        if _lacks_teacher(config, swept, folder):
            weights = train_teacher(config, folder / TEACHER, f"hydra.sweep.dir={folder}")
            _add(config, fixed, "model.teacher.weights", str(weights))
        varied = {_group(key) for key in swept}
        others = dict.fromkeys(f'"{_group(key)}"' for key in fixed if _group(key) not in varied)
        config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(others)}]")
        if optuna:
            _continue_study(config.hydra.sweeper)
        print_line("sweep", f"{folder}; an interrupted one goes on with the same command and hydra.sweep.dir={folder}")


@contextmanager
def _ends_the_sweep(config: DictConfig) -> Iterator[None]:
    """What a callback raises ends the sweep; Hydra would make a warning of it and go on without what it does."""
    try:
        with exit_on_user_error():
            yield
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            traceback.print_exc()
        print_error(f"the sweep in {config.hydra.sweep.dir} ends: {type(error).__name__}: {error}")
        sys.exit(2)


def _add(config: DictConfig, fixed: dict[str, str], key: str, value: str | float) -> None:
    """Adds an override for all trials, as if it stood at the end of the command."""
    OmegaConf.update(config, key, value)
    fixed[key] = f"{key}={value}"
    config.hydra.overrides.task.append(fixed[key])


def _overrides(config: DictConfig) -> tuple[dict[str, str], dict[str, str]]:
    """What is swept and what is fixed, by :func:`_key`, as written: the sweeper's own parameters and the command."""
    own = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*own, *config.hydra.overrides.task])
    overrides = {_key(override): override for override in parsed}  # the last one wins
    swept = {key: override.input_line for key, override in overrides.items() if override.is_sweep_override()}
    return swept, {key: override.input_line for key, override in overrides.items() if key not in swept}


def _key(override: Override) -> str:
    """What an override is for: ``loss.alpha``, ``loss``, or ``loss@loss.at`` of one in another place."""
    return override.get_key_element().lstrip("+~")


def _group(key: str) -> str:
    """A key as Hydra compares it to those that it leaves out of folder names: ``loss`` of ``loss@loss.at``."""
    return key.split("@")[0]


def _lacks_teacher(config: DictConfig, swept: Collection[str], folder: Path) -> bool:
    """Whether a teacher is to be trained for all trials, before the first one would do it with its own values."""
    if any(re.match(r"(data|recipe|model|experiment)$|data\.|model\.teacher\b", key) for key in swept):
        return False  # each its own
    teacher = config.model.teacher
    if teacher is None or teacher.weights != "fit" or ("loss" not in swept and loss_name(config.loss) == "CE"):
        return False
    if (folder / TEACHER).exists():
        return True
    data = instantiate(teacher_config(config, folder / TEACHER).data)
    return TeacherStore(Path(config.paths.teachers)).find(data.name, teacher.name) is None


def _same_sweep(folder: Path, swept: Mapping[str, str], fixed: Mapping[str, str], *, values_too: bool) -> None:
    """Leaves :data:`SWEEP`, and refuses a command that would mix other trials with those of a folder.

    Args:
        folder: the sweep's.
        swept: overrides that are swept, by key.
        fixed: overrides that are not.
        values_too: whether the values of what is swept must be the same, as in a study of Optuna's.
    """
    record = folder / SWEEP
    mine = {line for key, line in fixed.items() if decides(key) and key != "launcher"}
    mine |= set(swept.values()) if values_too else set(swept)
    mine = _canonical(mine)
    if record.exists():
        theirs = _canonical(OmegaConf.load(record))
        if changed := sorted(theirs ^ mine):
            values = (
                "" if values_too else ", in which only the values of what is swept may change (a single one: choice(4))"
            )
            raise UserError(
                f"{folder} holds a sweep of another command: they differ in {', '.join(changed)}. Continue it with its "
                f"own{values}, or choose another hydra.sweep.dir."
            )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = record.with_suffix(".tmp")
    OmegaConf.save(OmegaConf.create(sorted(mine)), temporary)
    temporary.replace(record)


def _canonical(lines: Iterable[str]) -> set[str]:
    """Overrides, and keys, as the same texts however they were written."""
    parts = (line.partition("=") for line in lines)
    return {f"{key}={canonical(key, value)}" if equals else key for key, equals, value in parts}


def _continue_study(sweeper: DictConfig) -> None:
    """Lets Optuna's sweeper go on in a study that was interrupted, and live with failed trials.

    By itself it would start counting anew, and leave trials that were running when it ended as if they still were.
    """
    sweeper.max_failure_rate = 1.0
    if sweeper.storage is None:
        return
    for logger in ("optuna", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    import optuna

    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    study = optuna.create_study(
        study_name=sweeper.study_name, storage=sweeper.storage, direction=sweeper.direction, load_if_exists=True
    )
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == optuna.trial.TrialState.RUNNING:
            optuna.Trial(study, trial._trial_id).set_user_attr(INTERRUPTED, True)
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)  # with the same values, and so in the same folder
    done = [trial for trial in trials if trial.state.is_finished() and INTERRUPTED not in trial.user_attrs]
    sweeper.n_trials = max(0, sweeper.n_trials - len(done))
    if sweeper.sampler.get("seed") is not None:
        sweeper.sampler.seed += len(trials)  # or it would propose the first ones again


@dataclass(frozen=True)
class Setting:
    """One combination of swept values, with its repetitions over seeds.

    Args:
        values: the overrides that are swept, but for the seed.
        runs: the finished trials.
    """

    values: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def top1(self) -> float:
        """Mean over the runs of the last epoch's top-1, in percent."""
        return mean(run.summary.top1 for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the runs; None of a single one."""
        return stdev(run.summary.top1 for run in self.runs) if len(self.runs) > 1 else None


def settings_of(folder: Path, swept: Collection[str]) -> list[Setting]:
    """The settings that a sweep has tried to the end, the best first.

    Args:
        folder: the sweep's.
        swept: the keys that it sweeps; ``seed`` makes repetitions of a setting.
    """
    parser = OverridesParser.create()
    groups = defaultdict(list)
    for run in find_runs([folder]):
        values = {_key(override): override.input_line for override in parser.parse_overrides(run.overrides)}
        inner = any((path / SWEEP).exists() for path in _up_to(run.folder, folder))  # a sweep within
        if inner or run.folder == folder / TEACHER or not set(swept) <= set(values) or not isfinite(run.summary.top1):
            continue
        groups[tuple(values[key] for key in swept if key != "seed")].append(run)
    return sorted((Setting(values, tuple(runs)) for values, runs in groups.items()), key=lambda s: -s.top1)


def _up_to(folder: Path, top: Path) -> list[Path]:
    """A folder and those above it, as far as one that is left out."""
    return [path for path in (folder, *folder.parents) if path.is_relative_to(top) and path != top]


def _report(config: DictConfig, swept: Collection[str], fixed: Mapping[str, str]) -> None:
    folder = Path(config.hydra.sweep.dir)
    settings = settings_of(folder, swept)
    failed = sorted(path.parent for path in folder.rglob(ERROR) if not (path.parent / SUMMARY).exists())
    for path in failed:
        print_line("failed", f"{path}: {(path / ERROR).read_text().strip()}")
    if not settings:
        raise UserError(f"no trial has finished in {folder}; what went wrong is in its {ERROR} files.")
    keys = [key for key in swept if key != "seed"]
    rows = [
        (
            *(short_value(value.split("=", 1)[1]) for value in setting.values),
            mean_and_std(setting.top1, setting.spread),
            len(setting.runs),
            mean(run.summary.top1_best for run in setting.runs),
            max(run.summary.epochs for run in setting.runs),
        )
        for setting in settings
    ]
    best = settings[0]
    validated_on = best.runs[0].summary.validated_on
    columns = (*keys, "top-1 %, last epoch", "n", "top-1 %, best epoch", "epochs")
    print_table(f"{len(settings)} settings on {validated_on}, the best first", columns, rows[:20])
    if len(rows) > 20:
        print_line("", f"and {len(rows) - 20} more in {folder}")
    if not keys or not best.runs[0].config["data"]["val_fraction"]:  # repetitions, or a comparison on the test split
        return
    score = f"{rows[0][len(keys)]} % on {validated_on}, n = {len(best.runs)}"
    print_line("best", f"{' '.join(best.values)}: {score}; {retrain_command(config, best, fixed)}")


def _as_a_list(fixed: Mapping[str, str]) -> dict[str, str]:
    """``loss=[rld,at]`` as the user has written it, before :func:`expand_combined_loss`."""
    names = [match[1] for line in fixed.values() if (match := re.fullmatch(r"\+loss@loss\.(\w+)=\1", line))]
    if fixed.get("loss") != "loss=combined" or len(names) < 2:
        return dict(fixed)
    combination = f"loss=[{','.join(names)}]"
    expanded = expand_combined_loss([combination])
    return {key: line for key, line in fixed.items() if line not in expanded} | {"loss": combination}


def retrain_command(config: DictConfig, best: Setting, fixed: Mapping[str, str]) -> str:
    """The command that trains with a sweep's best setting on the whole training split, and tests once, at the end.

    Args:
        config: the sweep's, as Hydra's callbacks get it.
        best: the setting.
        fixed: the overrides that the sweep does not vary, by key.
    """
    gone = ("sweep", "launcher", "seed", HELD_OUT)
    settled = {key: line for key, line in fixed.items() if key not in gone and not key.startswith("callbacks.pruner")}
    settled = _as_a_list(settled)
    if "model.teacher.weights" in settled and f"{config.hydra.sweep.dir}/" in settled["model.teacher.weights"]:
        settled["model.teacher.weights"] = "model.teacher.weights=fit"  # the sweep's own has not seen all images
    if not any(re.match(r"\+?loss[=@]", line) for line in (*settled.values(), *best.values)):
        settled["loss"] = f"loss={config.hydra.runtime.choices.loss}"  # which sweep=... may have chosen
    epochs = best.runs[0].config["recipe"]["epochs"]
    last = [f"{HELD_OUT}=0", f"trainer.check_val_every_n_epoch={epochs}"]
    return f"python {sys.argv[0]} {shlex.join([*settled.values(), *best.values, *last])}"
