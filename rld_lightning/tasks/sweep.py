"""A sweep from its first line to its last; in between, Hydra runs the trials (:mod:`rld_lightning.tasks.trial`)."""

import logging
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from rld_lightning.console import print_error, print_files, print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.distributed import rank_zero_only, started_by
from rld_lightning.errors import UserError, first_line, user_errors
from rld_lightning.hydra.mistakes import check, with_value
from rld_lightning.hydra.quoting import as_argument, for_hydra
from rld_lightning.hydra.script import exit_on_user_error, is_trial
from rld_lightning.hydra.study import check_options
from rld_lightning.hydra.sweepers import own_params
from rld_lightning.models.imported import trust
from rld_lightning.models.store import TeacherStore
from rld_lightning.redact import redact_text
from rld_lightning.reporting.labels import short_value
from rld_lightning.runs.events import note
from rld_lightning.runs.files import CONFIG, STUDENT, SUMMARY, SWEEP, TEACHER, read_config, write_yaml
from rld_lightning.runs.folder import lock_folder
from rld_lightning.runs.likeness import canonical, decides
from rld_lightning.runs.naming import loss_name
from rld_lightning.tasks.batch_size import make_data
from rld_lightning.tasks.early import check_trial
from rld_lightning.tasks.fit import fit_in_processes
from rld_lightning.tasks.kept import share_data
from rld_lightning.tasks.once import run_once
from rld_lightning.tasks.plan import alone, changed
from rld_lightning.tasks.teacher_of_run import is_for_others, keep_teacher, train_teacher
from rld_lightning.tasks.trials import ALONE, HELD_OUT, key_of, line_of, print_failed, print_networks, print_settings
from rld_lightning.tasks.turn import turn_to_train
from rld_lightning.tasks.watch import Watch

WEIGHTS = "model.teacher.weights"


class Sweep(Callback):
    """What every sweep gets, whichever sweeper chooses the values and whichever launcher runs the trials.

    At its start: hyper-parameters are tuned on a held-out part of the training split, a trial's folder is named after
    the values that are swept, the teacher of all trials is trained, and an Optuna study in a storage goes on where it
    was. At its end: the trials in order, and the best setting with the command that trains with it on the whole split.

    Args:
        held_out: ``data.val_fraction`` of sweeps that do not say their own; 0 for a comparison on the test split.
        store: whether trials with ``model.teacher.weights=fit`` take the teacher of the store, and one that is trained
            for them is kept there; with False the sweep has its own.
        alone: whether the student is trained by itself as well, with cross-entropy; the networks are then printed side
            by side at the end.
        report: whether a report is written at the end.
        watch: whether the terminal shows the sweep, a line for each trial that ends and one for what is under way, and
            the trials' own output goes to their folders.
    """

    def __init__(
        self, held_out: float, *, store: bool = True, alone: bool = False, report: bool = False, watch: bool = False
    ) -> None:
        self.held_out = held_out
        self.store = store
        self.alone = alone
        self.report = report
        self.watch = watch
        self._swept: tuple[str, ...] = ()
        self._lock: FileLock | None = None
        self._watch: Watch | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock and the screen: launchers send callbacks along to the processes of trials."""
        return {**vars(self), "_lock": None, "_watch": None}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Puts in what makes a sweep a clean one.

        Raises:
            SystemExit: the sweep is a mistake, or cannot start; with one sentence.
        """
        with _ends_the_sweep(config):
            self._begin(config)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints what the trials came to, and writes the report.

        Raises:
            SystemExit: a trial has failed (1), or none has finished (2).
        """
        failed = 0
        if self._watch is not None:
            self._watch.stop()
            failed = self._watch.failed
        with _ends_the_sweep(config):
            folder = Path(config.hydra.sweep.dir)
            failed = max(failed, print_failed(folder))
            if self.alone:
                print_networks(folder)
            else:
                print_settings(config, *_overrides(config))
            if self.report:
                _write_report(config, folder)
        if failed:
            sys.exit(1)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Notes that a trial begins, in whatever process."""
        known = (Path(config.hydra.runtime.output_dir) / SUMMARY).exists()
        _note(config, state="begins", trial=self._name(config), known=known)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Notes how a trial has ended."""
        if job_return.status == JobStatus.COMPLETED:
            _note(config, state="ends", trial=self._name(config), top1=job_return.return_value)
        else:
            error = job_return._return_value  # as a property it would raise it
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            _note(config, state="ends", trial=self._name(config), error=text)

    def _name(self, config: DictConfig) -> str:
        """The values of a trial, long numbers shortened."""
        own = {key_of(override): line_of(override) for override in _parse_all(config.hydra.overrides.task)}
        parts = [own[key].partition("=") for key in self._swept if key in own]
        return " ".join(f"{key}={short_value(value)}" for key, _, value in parts)

    def _begin(self, config: DictConfig) -> None:
        folder = Path(config.hydra.sweep.dir)
        trust(config.model.student.name, *([config.model.teacher.name] if config.model.teacher else []))
        swept, fixed = _overrides(config)
        self._swept = tuple(swept)
        if not swept and not config.hydra.sweeper.get("params"):  # of which a command may leave one value: seed=3
            raise UserError(
                "-m has nothing to go through: give an option several values, such as seed=0,1,2, or leave -m away."
            )
        self._hold_out(config, swept, fixed)
        optuna = "n_trials" in config.hydra.sweeper
        if optuna:
            with user_errors():
                check_options(config.hydra.sweeper)
        if optuna and "seed" in swept:
            raise UserError(
                "Optuna would choose the luckiest seed; sweep with one, then repeat the best setting with seed=0,1,2."
            )
        _check_values(config, listed=not optuna)
        self._lock = lock_folder(folder, ".sweep.lock", "swept")  # until the process ends; trials have their own
        _same_sweep(folder, swept, fixed, values_too=optuna)
        self._train_first(config, swept, fixed, folder)
        varied = {_group(key) for key in swept}
        others = dict.fromkeys(f'"{_group(key)}"' for key in fixed if _group(key) not in varied)
        config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(others)}]")
        share_data(changed(config, {"paths.run": str(folder)}).data)
        print_line("sweep", f"{folder}; an interrupted one goes on with the same command and {_here(folder)}")
        for name in ("hydra", "hydra_plugins"):  # whose launchers list the trials
            logging.getLogger(name).setLevel(logging.WARNING)
        if self.watch:
            self._watch = Watch(folder)

    def _hold_out(self, config: DictConfig, swept: Collection[str], fixed: dict[str, str]) -> None:
        """Holds training images out where something is chosen by its accuracy."""
        if not set(swept) - {"seed", HELD_OUT} or HELD_OUT in swept or config.data.val_fraction:
            return
        tuned = [key for key in swept if "." in key]
        if tuned and (HELD_OUT in fixed or not self.held_out):
            leave = f"leave it away (a sweep holds out {self.held_out:g} of the training images), or give another share"
            way_out = leave if self.held_out else f"add {HELD_OUT}=0.1"
            raise UserError(f"{HELD_OUT}=0 would tune {', '.join(tuned)} on the test split; {way_out}.")
        if HELD_OUT not in fixed:
            _add(config, fixed, HELD_OUT, self.held_out)

    def _train_first(self, config: DictConfig, swept: Mapping[str, str], fixed: dict[str, str], folder: Path) -> None:
        """Trains what the trials learn from, or are compared to, once and with one seed for all."""
        fit = partial(fit_in_processes, resume_hint=_here(folder))
        if self._lacks_teacher(config, swept, folder):
            name = config.model.teacher.name
            if (started := started_by()) is not None and started.processes > 1:
                raise UserError(f"the teacher {name} starts its own processes; start this without {started.by}.")
            shared = (folder / TEACHER).absolute()
            data = _data(config, shared)
            turn: AbstractContextManager[bool] = nullcontext(enter_result=True)
            start = config.model.teacher.get("start")
            if self.store and is_for_others(data, start) and not shared.exists():
                turn = turn_to_train(_store(config), data.name, name, folder)
            with turn as lacks:
                if lacks:
                    summary = train_teacher(changed(config, {"seed": _seed(config, swept, shared)}), shared, fit)
                    if self.store:
                        keep_teacher(summary, shared, _store(config), data, name, start)
                    _add(config, fixed, WEIGHTS, str(folder / TEACHER / STUDENT))
        if self.alone:
            own = (folder / ALONE).absolute()
            seeded = changed(config, {"seed": _seed(config, swept, own)})
            run_once(alone(seeded, config.model.student.name, config.model.student.weights, own), fit, name="student")

    def _lacks_teacher(self, config: DictConfig, swept: Collection[str], folder: Path) -> bool:
        """Whether a teacher is to be trained for all trials, before the first one would do it with its own values."""
        if any(re.match(r"(data|recipe|model|experiment)$|data\.|model\.teacher\b", key) for key in swept):
            return False  # each its own
        teacher = config.model.teacher
        if teacher is None or teacher.weights != "fit" or ("loss" not in swept and loss_name(config.loss) == "CE"):
            return False
        if not self.store or teacher.get("start") is not None or (folder / TEACHER).exists():
            return True
        return not _store(config).has(_data(config, folder / TEACHER).name, teacher.name)


@rank_zero_only
def _note(config: DictConfig, **event: Any) -> None:
    if is_trial():  # Hydra calls its callbacks for a single run as well
        note(Path(config.hydra.sweep.dir), number=config.hydra.job.num, **event)


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


def _here(folder: Path) -> str:
    return as_argument("hydra.sweep.dir", folder)


def _store(config: DictConfig) -> TeacherStore:
    return TeacherStore(Path(config.paths.teachers))


def _data(config: DictConfig, folder: Path) -> ImageDataModule:
    """The data of a run in a folder, not loaded."""
    return make_data(changed(config, {"paths.run": str(folder)}).data)


def _add(config: DictConfig, fixed: dict[str, str], key: str, value: str | float) -> None:
    """Adds an override for all trials, in the place of what the command says."""
    OmegaConf.update(config, key, value)
    task = config.hydra.overrides.task
    if key in fixed and fixed[key] in task:
        task.remove(fixed[key])
    fixed[key] = f"{key}={for_hydra(value) if isinstance(value, str) else value}"
    task.append(fixed[key])


def _parsed(config: DictConfig) -> list[Override]:
    """The sweeper's own parameters, then the command's overrides."""
    return _parse_all([*own_params(config.hydra.sweeper.get("params")), *config.hydra.overrides.task])


def _parse_all(lines: Iterable[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(lines))


def _overrides(config: DictConfig) -> tuple[dict[str, str], dict[str, str]]:
    """What is swept and what is fixed, by key, as written: the sweeper's own parameters and the command."""
    overrides = {key_of(override): override for override in _parsed(config)}  # the last one wins
    swept = {key: line_of(override) for key, override in overrides.items() if override.is_sweep_override()}
    return swept, {key: line_of(override) for key, override in overrides.items() if key not in swept}


def _group(key: str) -> str:
    """A key as Hydra compares it to those that it leaves out of folder names: ``loss`` of ``loss@loss.at``."""
    return key.split("@")[0]


def _parse(line: str) -> Override:
    return OverridesParser.create().parse_override(line)


def _values(override: Override) -> list[str]:
    """The overrides that a swept one stands for; of an interval its ends."""
    if isinstance(ends := override.value(), IntervalSweep):
        return [f"{override.get_key_element()}={end}" for end in (ends.start, ends.end)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _seed(config: DictConfig, swept: Mapping[str, str], folder: Path) -> int:
    """The seed of what is trained for all trials: that of a run that has begun, else the first of the trials'."""
    if (folder / CONFIG).exists():
        return read_config(folder)["seed"]
    if "seed" not in swept:
        return config.seed
    first = _values(_parse(swept["seed"]))[0]
    return int(first.partition("=")[2])


def _check_values(config: DictConfig, *, listed: bool) -> None:
    """Composes the configuration with each value that is swept, before anything is trained for the trials.

    Args:
        config: the sweep's.
        listed: whether the sweep goes through lists of values.

    Raises:
        UserError: there is no such option, or no such key, or a value is not allowed; or an interval where a list is
            wanted.
    """
    overrides = {override.get_key_element(): override for override in _parsed(config)}  # as Hydra's sweeper has them
    if listed and (intervals := [o.input_line for o in overrides.values() if o.is_interval_sweep()]):
        raise UserError(
            f"{intervals[0]} has no list of values, which a grid goes through: write them with commas between, or let "
            "Optuna choose (hydra/sweeper=optuna)."
        )
    values = {key: _values(override) for key, override in overrides.items() if override.is_sweep_override()}
    first = {key: listed[:1] for key, listed in values.items()}
    first |= {key: [line_of(override)] for key, override in overrides.items() if key not in values}
    others = [{key: [value]} for key, listed in values.items() if "." not in key for value in listed[1:]]
    loader = GlobalHydra.instance().config_loader()
    for trial in [{}, *others]:
        lines = [line for key in overrides for line in ({**first, **trial})[key]]
        try:
            cfg = loader.load_sweep_config(config, lines)
        except HydraException as error:
            raise UserError(f"{first_line(error)} (--help lists the options)") from error
        check(cfg)
        check_trial(cfg)
        if not trial:
            for line in [line for key, listed in values.items() if "." in key for line in listed[1:]]:
                check(with_value(cfg, line))
                if line.startswith(("model.", "data.")):
                    check_trial(with_value(cfg, line))


def _same_sweep(folder: Path, swept: Mapping[str, str], fixed: Mapping[str, str], *, values_too: bool) -> None:
    """Leaves :data:`SWEEP`, and refuses a command that would mix other trials with those of a folder.

    Args:
        folder: the sweep's.
        swept: overrides that are swept, by key.
        fixed: overrides that are not.
        values_too: whether the values of what is swept must be the same, as in a study of Optuna's.
    """
    record = folder / SWEEP
    current = {line for key, line in fixed.items() if decides(key)}
    current |= set(swept.values()) if values_too else set(swept)
    current = _canonical(map(redact_text, current), folder)
    if record.exists():
        saved = _canonical(OmegaConf.load(record), folder)
        if differing := sorted(saved ^ current):
            values = (
                "" if values_too else ", in which only the values of what is swept may change (a single one: choice(4))"
            )
            raise UserError(
                f"{folder} holds a sweep of another command: they differ in {', '.join(differing)}. Continue it with "
                f"its own{values}, or choose another hydra.sweep.dir."
            )
    write_yaml(record, sorted(current))


def _canonical(lines: Iterable[str], folder: Path) -> set[str]:
    """Overrides, and keys, as the same texts however they were written."""
    parts = (line.partition("=") for line in lines)
    # How trials are chosen and started says nothing about them.
    texts = {
        f"{key}={canonical(key, value)}" if equals else key
        for key, equals, value in parts
        if key not in ("launcher", "sweep")
    }
    own = f"{WEIGHTS}={(folder / TEACHER / STUDENT).absolute()}"  # as comparisons of earlier versions have it
    return {f"{WEIGHTS}=fit" if text == own else text for text in texts}


def _write_report(config: DictConfig, folder: Path) -> None:
    from rld_lightning.reporting.report import write_report  # pandas and matplotlib take seconds
    from rld_lightning.tasks.cost import measure_cost

    swept, _ = _overrides(config)
    losses = [line.partition("=")[2] for line in _values(_parse(swept["loss"]))] if "loss" in swept else []
    title = f"{config.model.label}: {', '.join(losses)}" if losses else config.model.label
    files = write_report([folder], folder / "report", title=title, cost_of=measure_cost)
    print_files(folder / "report", {files.html.name: "the results", files.markdown.name: "the same as Markdown"})
