"""A sweep from its first line to its last; in between, Hydra runs the trials (:mod:`rld_lightning.tasks.trial`)."""

import logging
import shlex
import sys
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rld_lightning.console import print_error, print_line, print_table
from rld_lightning.reporting.runs import Run, find_runs
from rld_lightning.tasks.trial import ERROR

HELD_OUT = "data.val_fraction"
RECORD = "sweep.yaml"  # of what a sweep varies and what it does not, in its folder


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

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Puts in what makes a sweep a clean one.

        Raises:
            SystemExit: hyper-parameters would be tuned on the test split; with one sentence, as other mistakes.
        """
        swept, fixed = _overrides(config)
        tuned = [key for key in swept if "." in key and key != HELD_OUT]
        if set(swept) - {"seed", HELD_OUT} and HELD_OUT not in swept and not _held_out(config, fixed):
            if HELD_OUT not in fixed:
                config.hydra.overrides.task.append(f"{HELD_OUT}={self.held_out}")
                fixed[HELD_OUT] = self.held_out
            elif tuned:
                print_error(
                    f"{HELD_OUT}=0 would tune {', '.join(tuned)} on the test split; leave it away (a sweep holds out "
                    f"{self.held_out:g} of the training images), or give another share."
                )
                sys.exit(2)
        if swept:
            others = ",".join(f'"{key}"' for key in fixed)
            config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{others}]")
        folder = Path(config.hydra.sweep.dir)
        _same_sweep(folder, swept, fixed)
        if "max_failure_rate" in config.hydra.sweeper:
            _continue_study(config.hydra.sweeper)
        print_line("sweep", f"{folder}; an interrupted one goes on with the same command and hydra.sweep.dir={folder}")

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints the trials, the best first, and how to train with its setting."""
        swept, fixed = _overrides(config)
        if swept:
            _report(config, swept, fixed)


def _overrides(config: DictConfig) -> tuple[dict[str, str], dict[str, str]]:
    """What is swept and what is fixed, by key, as written: the sweeper's own parameters and the command line."""
    own = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*own, *config.hydra.overrides.task])
    overrides = {override.key_or_group: override for override in parsed}  # the last one wins
    swept = {key: override.input_line for key, override in overrides.items() if override.is_sweep_override()}
    return swept, {key: override.input_line for key, override in overrides.items() if key not in swept}


def _held_out(config: DictConfig, fixed: Mapping[str, str]) -> float:
    """The share of the training split that the configuration holds out by itself."""
    loader = GlobalHydra.instance().config_loader()
    try:
        composed = loader.load_configuration(config.hydra.job.config_name, list(fixed.values()), RunMode.RUN)
        return OmegaConf.select(composed, HELD_OUT) or 0.0
    except (HydraException, OmegaConfBaseException):  # what is fixed may need what is swept
        return 0.0


def _same_sweep(folder: Path, swept: Mapping[str, str], fixed: Mapping[str, str]) -> None:
    """Leaves :data:`RECORD`, and ends a command that would mix other trials with those of a folder."""
    record = folder / RECORD
    if record.exists():
        there = OmegaConf.to_container(OmegaConf.load(record))
        mine, theirs = set(fixed.values()) | set(swept), set(there["fixed"].values()) | set(there["swept"])
        if changed := sorted(theirs ^ mine):
            print_error(
                f"{folder} holds a sweep of another command: they differ in {', '.join(changed)}. Continue it with its "
                "own, in which only the values of what is swept may change, or choose another hydra.sweep.dir."
            )
            sys.exit(2)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create({"swept": dict(swept), "fixed": dict(fixed)}), record)


def _continue_study(sweeper: DictConfig) -> None:
    """Lets Optuna's sweeper go on in a study that was interrupted, and live with failed trials.

    By itself it would start counting anew, and leave trials that were running when it ended as if they still were.
    """
    sweeper.max_failure_rate = 1.0
    if sweeper.storage is None:
        return
    import optuna

    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    for logger in ("optuna", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    study = optuna.create_study(
        study_name=sweeper.study_name, storage=sweeper.storage, direction=sweeper.direction, load_if_exists=True
    )
    trials = study.get_trials(deepcopy=False)
    states = optuna.trial.TrialState
    again = set()
    for trial in trials:
        if trial.state == states.RUNNING:
            study.tell(trial.number, state=states.FAIL)
            study.enqueue_trial(trial.params)  # with the same values, and so in the same folder
            again.add(_values(trial.params))
        elif trial.state == states.WAITING:  # since an earlier time
            again.add(_values(trial.system_attrs["fixed_params"]))
    known = {_values(trial.params) for trial in trials if trial.state != states.WAITING}
    sweeper.n_trials = max(0, sweeper.n_trials - len(known - again))
    if sweeper.sampler.get("seed") is not None:
        sweeper.sampler.seed += len(trials)  # or it would propose the first ones again


def _values(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items()))


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
        overrides = parser.parse_overrides(run.overrides)
        # A teacher that a trial has trained, or a sweep within, such as the one run of a comparison's teacher.
        if not overrides or any((path / RECORD).exists() for path in _up_to(run.folder, folder)):
            continue
        values = {override.key_or_group: override.input_line for override in overrides}
        groups[tuple(values[key] for key in swept if key in values and key != "seed")].append(run)
    return sorted((Setting(values, tuple(runs)) for values, runs in groups.items()), key=lambda s: -s.top1)


def _up_to(folder: Path, top: Path) -> list[Path]:
    """A folder and those above it, as far as one that is left out."""
    return [path for path in (folder, *folder.parents) if path.is_relative_to(top) and path != top]


def _report(config: DictConfig, swept: Collection[str], fixed: Mapping[str, str]) -> None:
    folder = Path(config.hydra.sweep.dir)
    settings = settings_of(folder, swept)
    failed = sorted(path.parent for path in folder.rglob(ERROR))
    for path in failed:
        print_line("failed", f"{path}: {(path / ERROR).read_text().strip()}")
    if not settings:
        print_line("sweep", "no trial has finished")
        return
    keys = [key for key in swept if key != "seed"]
    rows = [
        (
            *(_short(value.split("=", 1)[1]) for value in setting.values),
            f"{setting.top1:.2f}" + (f" ± {setting.spread:.2f}" if setting.spread is not None else ""),
            len(setting.runs),
            mean(run.summary.top1_best for run in setting.runs),
            max(run.summary.epochs for run in setting.runs),
        )
        for setting in settings
    ]
    best = settings[0]
    validated_on = best.runs[0].summary.validated_on.split(" (")[0]  # the seed of the split is a trial's own
    columns = (*keys, "top-1 %, last epoch", "n", "best epoch", "epochs")
    print_table(f"{len(settings)} settings on {validated_on}, the best first", columns, rows[:20])
    if len(rows) > 20:
        print_line("", f"and {len(rows) - 20} more in {folder}")
    if not keys or not best.runs[0].config["data"]["val_fraction"]:  # repetitions, or a comparison on the test split
        return
    score = f"{rows[0][len(keys)]} % on {validated_on}, n = {len(best.runs)}"
    print_line("best", f"{' '.join(best.values)}: {score}; {retrain_command(config, best, fixed)}")


def _short(value: str) -> str:
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def retrain_command(config: DictConfig, best: Setting, fixed: Mapping[str, str]) -> str:
    """The command that trains with a sweep's best setting on the whole training split, and tests once, at the end.

    Args:
        config: the sweep's, as Hydra's callbacks get it.
        best: the setting.
        fixed: the overrides that the sweep does not vary, by key.
    """
    gone = ("sweep", "launcher", "seed", HELD_OUT)
    settled = {key: line for key, line in fixed.items() if key not in gone and not key.startswith("callbacks.pruner")}
    if not any(key == "loss" or key.startswith("loss@") for key in (*settled, *best.values)):
        settled["loss"] = f"loss={config.hydra.runtime.choices.loss}"  # which sweep=... may have chosen
    epochs = best.runs[0].config["recipe"]["epochs"]
    last = [f"{HELD_OUT}=0", f"trainer.check_val_every_n_epoch={epochs}"]
    return f"python {sys.argv[0]} {shlex.join([*settled.values(), *best.values, *last])}"
