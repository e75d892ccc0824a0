"""Hydra callback that prepares and finishes a sweep; Hydra runs the trials (:mod:`rld_lightning.tasks.trial`)."""

import logging
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from rld_lightning.console import print_error, print_files, print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.distributed import external_launcher, rank_zero_only
from rld_lightning.errors import UserError, user_errors
from rld_lightning.hydra.quoting import as_argument, for_hydra
from rld_lightning.hydra.script import exit_on_user_error, is_trial
from rld_lightning.hydra.sweeps.optuna_study import check_options
from rld_lightning.models.imported import trust
from rld_lightning.models.teacher.teacher_store import TeacherStore
from rld_lightning.reporting.labels import short_value
from rld_lightning.runs.events import log_event
from rld_lightning.runs.files import ALONE, CONFIG, STUDENT, SUMMARY, TEACHER, read_config
from rld_lightning.runs.folder import lock_folder
from rld_lightning.runs.naming import loss_name
from rld_lightning.runs.summary import read_summary
from rld_lightning.tasks.fit import fit_in_processes
from rld_lightning.tasks.run.make import make_data
from rld_lightning.tasks.run.plan import standalone_config, with_values
from rld_lightning.tasks.run.resume import run_once
from rld_lightning.tasks.run.shared_data import share_data
from rld_lightning.tasks.sweep.live_progress import LiveProgress
from rld_lightning.tasks.sweep.swept_values import (
    WEIGHTS,
    check_swept,
    group_of,
    overrides_of,
    parse,
    refuse_another_sweep,
    values_of,
)
from rld_lightning.tasks.sweep.trial_tables import (
    HELD_OUT,
    key_of,
    line_of,
    print_failed,
    print_networks,
    print_settings,
)
from rld_lightning.tasks.teacher.training_lock import training_turn
from rld_lightning.tasks.teacher.weights import is_reusable, store_teacher, train_teacher


class Sweep(Callback):
    """Prepares and finishes every sweep, for any sweeper and launcher.

    At its start: holds out a part of the training split for tuning, names trial directories after the swept values,
    trains the teacher of all trials, and continues an Optuna study in a storage. At its end: prints the trials in
    order, and the best setting with the command that trains with it on the whole split.

    Args:
        held_out: default ``data.val_fraction`` of sweeps; 0 for a comparison on the test split.
        store: whether trials with ``model.teacher.weights=fit`` use the store's teacher, and a teacher trained for them
            is stored; with False the sweep has its own.
        alone: whether to train the student alone as well, with cross-entropy; the networks are then printed side by
            side at the end.
        report: whether to write a report at the end.
        watch: whether the terminal shows the sweep, with a line per finished trial and one for the progress; the
            trials' output goes to their directories.
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
        self._watch: LiveProgress | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Omits the lock and the live display: launchers send callbacks to the trials' processes."""
        return {**vars(self), "_lock": None, "_watch": None}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Adds the overrides that a sound sweep needs.

        Raises:
            SystemExit: the sweep is invalid or cannot start; with one sentence.
        """
        with _ends_the_sweep(config):
            self._begin(config)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints the trials' results, and writes the report.

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
                print_settings(config, *overrides_of(config))
            if self.report:
                _write_report(config, folder)
        if failed:
            sys.exit(1)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Logs that a trial has started, in its process."""
        known = (Path(config.hydra.runtime.output_dir) / SUMMARY).exists()
        _note(config, state="begins", trial=self._name(config), known=known)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Logs how a trial has ended."""
        if job_return.status == JobStatus.COMPLETED:
            early = _ended_after(Path(config.hydra.runtime.output_dir))
            _note(config, state="ends", trial=self._name(config), top1=job_return.return_value, **early)
        else:
            error = job_return._return_value  # the property would raise it
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            _note(config, state="ends", trial=self._name(config), error=text)

    def _name(self, config: DictConfig) -> str:
        """Describes a trial's values, with long numbers shortened."""
        own = {key_of(override): line_of(override) for override in parse(config.hydra.overrides.task)}
        parts = [own[key].partition("=") for key in self._swept if key in own]
        return " ".join(f"{key}={short_value(value)}" for key, _, value in parts)

    def _begin(self, config: DictConfig) -> None:
        folder = Path(config.hydra.sweep.dir)
        trust(config.model.student.name, *([config.model.teacher.name] if config.model.teacher else []))
        swept, fixed = overrides_of(config)
        self._swept = tuple(swept)
        if not swept and not config.hydra.sweeper.get("params"):  # a command may leave one value: seed=3
            raise UserError(
                "-m has nothing to sweep over: give an option several values, such as seed=0,1,2, or omit -m."
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
        check_swept(config, listed=not optuna)
        if not any(key.partition(".")[0] == "data" for key in swept):
            with user_errors():
                _data(config, folder).prepare_data()  # once: if it cannot be downloaded, no trial begins
        self._lock = lock_folder(folder, ".sweep.lock", "swept")  # until the process ends; trials have their own
        refuse_another_sweep(folder, swept, fixed, values_too=optuna)
        self._train_first(config, swept, fixed, folder)
        varied = {group_of(key) for key in swept}
        others = dict.fromkeys(f'"{group_of(key)}"' for key in fixed if group_of(key) not in varied)
        config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(others)}]")
        share_data(with_values(config, {"paths.run": str(folder)}).data)
        print_line("sweep", f"{folder}; to continue it if interrupted, use the same command and {_here(folder)}")
        for name in ("hydra", "hydra_plugins"):  # their launchers list the trials
            logging.getLogger(name).setLevel(logging.WARNING)
        if self.watch:
            self._watch = LiveProgress(folder)

    def _hold_out(self, config: DictConfig, swept: Collection[str], fixed: dict[str, str]) -> None:
        """Holds out training images if a setting is chosen by its accuracy."""
        if not set(swept) - {"seed", HELD_OUT} or HELD_OUT in swept or config.data.val_fraction:
            return
        tuned = [key for key in swept if "." in key]
        if tuned and (HELD_OUT in fixed or not self.held_out):
            omit = f"omit it (a sweep holds out {self.held_out:g} of the training images), or give another share"
            way_out = omit if self.held_out else f"add {HELD_OUT}=0.1"
            raise UserError(f"{HELD_OUT}=0 would tune {', '.join(tuned)} on the test split; {way_out}.")
        if HELD_OUT not in fixed:
            _add(config, fixed, HELD_OUT, self.held_out)

    def _train_first(self, config: DictConfig, swept: Mapping[str, str], fixed: dict[str, str], folder: Path) -> None:
        """Trains the networks that trials learn from, or are compared to, once and with one seed for all."""
        fit = partial(fit_in_processes, resume_hint=_here(folder))
        if self._lacks_teacher(config, swept, folder):
            name = config.model.teacher.name
            if (launcher := external_launcher()) is not None and launcher.processes > 1:
                raise UserError(f"the teacher {name} starts its own processes; run this without {launcher.name}.")
            shared = (folder / TEACHER).absolute()
            data = _data(config, shared)
            start = config.model.teacher.get("start")
            for_others = self.store and is_reusable(data, start) and not shared.exists()
            with training_turn(_store(config), data.name, name, folder, for_others=for_others) as lacks:
                if lacks:
                    summary = train_teacher(with_values(config, {"seed": _seed(config, swept, shared)}), shared, fit)
                    if self.store:
                        store_teacher(summary, shared, _store(config), data, name, start)
                    _add(config, fixed, WEIGHTS, str(folder / TEACHER / STUDENT))
        if self.alone:
            own = (folder / ALONE).absolute()
            seeded = with_values(config, {"seed": _seed(config, swept, own)})
            run_once(
                standalone_config(seeded, config.model.student.name, config.model.student.weights, own),
                fit,
                name="student",
            )

    def _lacks_teacher(self, config: DictConfig, swept: Collection[str], folder: Path) -> bool:
        """Whether to train a teacher for all trials, before the first trial would do it with its own values."""
        if any(re.match(r"(data|recipe|model|experiment)$|data\.|model\.teacher\b", key) for key in swept):
            return False  # each trial has its own
        teacher = config.model.teacher
        if teacher is None or teacher.weights != "fit" or ("loss" not in swept and loss_name(config.loss) == "CE"):
            return False
        if not self.store or teacher.get("start") is not None or (folder / TEACHER).exists():
            return True
        return not _store(config).has(_data(config, folder / TEACHER).name, teacher.name)


def _ended_after(run: Path) -> dict[str, int]:
    """Returns the number of epochs of a trial that ended early, for example pruned."""
    with suppress(OSError, ValueError):
        summary = read_summary(run)
        return {} if summary.trained_whole else {"ended_after": summary.epochs}
    return {}


@rank_zero_only
def _note(config: DictConfig, **event: Any) -> None:
    if is_trial():  # Hydra calls its callbacks for a single run as well
        log_event(Path(config.hydra.sweep.dir), number=config.hydra.job.num, **event)


@contextmanager
def _ends_the_sweep(config: DictConfig) -> Iterator[None]:
    """Makes a callback's exception end the sweep; Hydra would only warn and continue without the callback."""
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
    """Creates the data module of a run in a directory, without loading the data."""
    return make_data(with_values(config, {"paths.run": str(folder)}).data)


def _add(config: DictConfig, fixed: dict[str, str], key: str, value: str | float) -> None:
    """Adds an override for all trials, replacing that of the command."""
    OmegaConf.update(config, key, value)
    task = config.hydra.overrides.task
    if key in fixed and fixed[key] in task:
        task.remove(fixed[key])
    fixed[key] = f"{key}={for_hydra(value) if isinstance(value, str) else value}"
    task.append(fixed[key])


def _seed(config: DictConfig, swept: Mapping[str, str], folder: Path) -> int:
    """Returns the seed of networks trained for all trials: that of an interrupted run, else the first trial's."""
    if (folder / CONFIG).exists():
        saved = read_config(folder)
        if isinstance(saved, dict) and type(saved.get("seed")) is int:
            return saved["seed"]
        raise ValueError(f"{folder / CONFIG} is not the configuration of a run: its seed is no number; move it away.")
    if "seed" not in swept:
        return config.seed
    first = values_of(*parse([swept["seed"]]))[0]
    return int(first.partition("=")[2])


def _write_report(config: DictConfig, folder: Path) -> None:
    from rld_lightning.reporting.report import write_report  # pandas and matplotlib take seconds to import
    from rld_lightning.tasks.cost import measure_cost

    swept, _ = overrides_of(config)
    losses = [line.partition("=")[2] for line in values_of(*parse([swept["loss"]]))] if "loss" in swept else []
    title = f"{config.model.label}: {', '.join(losses)}" if losses else config.model.label
    files = write_report([folder], folder / "report", title=title, cost_of=measure_cost)
    print_files(folder / "report", {files.html.name: "the results", files.markdown.name: "the same as Markdown"})
