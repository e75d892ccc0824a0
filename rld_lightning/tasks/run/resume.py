"""Finds and checks what a run resumes from: a checkpoint, a directory, or nothing; and runs jobs only once."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig
from packaging.version import InvalidVersion, Version

from rld_lightning.callbacks import ExactResume
from rld_lightning.callbacks.exact_resume import has_stopped_early
from rld_lightning.console import print_line
from rld_lightning.distributed import rank_zero_only, started_by_run
from rld_lightning.errors import UserError, user_errors
from rld_lightning.hydra.quoting import as_argument
from rld_lightning.models.registry import canonical_name
from rld_lightning.models.weights.facts import read_facts
from rld_lightning.models.weights.read import hyper_parameters
from rld_lightning.redact import redact_text
from rld_lightning.runs.checkpoint import RunRecord, checkpoint_exists, read_checkpoint, read_record
from rld_lightning.runs.checkpoint_form import RATES
from rld_lightning.runs.files import CONFIG, ERROR, HYDRA, LAST, LOCK, METRICS, SUMMARY, TEACHER
from rld_lightning.runs.settings import changes, refuse_changes, refuse_other_settings
from rld_lightning.runs.summary import Summary, read_summary
from rld_lightning.tasks.run.plan import with_values
from rld_lightning.trainer_callbacks import callbacks_of

# Settings that a run may change when it resumes after divergence.
AGAINST_DIVERGENCE = (
    *RATES,
    *("trainer.gradient_clip_val", "trainer.gradient_clip_algorithm"),
)
_LIGHTNING = "pytorch-lightning_version"  # Lightning's key in each checkpoint
_LENGTH = ("recipe.epochs", "trainer.max_epochs", "trainer.max_steps")


def find_checkpoint(resume: str | None) -> str | None:
    """Returns the checkpoint from which a run resumes.

    Args:
        resume: a checkpoint, or a run directory with its ``last.ckpt``.

    Returns:
        the checkpoint, whether it exists or not; None if the run in the directory has started without writing one yet,
        so that it starts over.

    Raises:
        ValueError: the run in the directory has finished without one.
    """
    if resume is None:
        return None
    path = Path(resume)
    path = path / LAST if path.is_dir() else path
    folder = path.parent
    begun = any((folder / name).exists() for name in (CONFIG, HYDRA, LOCK, METRICS, TEACHER))
    if checkpoint_exists(path) or path.name != LAST or not begun:
        return str(path)
    if (folder / SUMMARY).exists():
        raise ValueError(f"the run in {folder} has ended and left no {LAST} to resume from; choose another folder.")
    return None


@rank_zero_only
def check_folder(run: Path, resume: str | None, given: str | None) -> None:
    """Checks that a run may use its directory, and removes remains of a run that starts over.

    Args:
        resume: the checkpoint from which it resumes, from :func:`find_checkpoint`.
        given: the user's value of ``resume``.

    Raises:
        ValueError: the directory contains another run.
    """
    if resume is not None and Path(resume).absolute() == (run / LAST).absolute():
        return
    if resume is None and given is not None:
        folder = Path(given) if Path(given).is_dir() else Path(given).parent
        teacher = f", but its teacher resumes with hydra.run.dir={folder}" if (folder / TEACHER).exists() else ""
        if folder.absolute() == run.absolute():
            (run / METRICS).unlink(missing_ok=True)  # of an incomplete epoch
            teacher = ""
        if not started_by_run():  # otherwise the parent has printed it
            print_line("resume", f"there is no checkpoint in {folder} yet: the run starts over{teacher}")
    if (run / METRICS).exists() or checkpoint_exists(run / LAST):
        raise ValueError(
            f"{run} holds a run already; nothing is overwritten: choose another folder (hydra.run.dir), or continue "
            f"it ({as_argument('resume', run)})."
        )


def check_resume(path: Path, student: str, cfg: DictConfig) -> RunRecord:
    """Checks that a file is a checkpoint of a run with the same settings.

    A resumed run may change its length, its learning rate, and gradient clipping.

    Returns:
        what it records about its run.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a checkpoint, or one of another student or other settings; or the run would have another
            length, which its schedule does not allow.
    """
    checkpoint = _read(path)
    found = read_facts(hyper_parameters(checkpoint), path).name or student
    # SimKD appends the teacher's name; digits alone are a size, which belongs to the student.
    if not re.fullmatch(rf"{re.escape(canonical_name(student))}(@.*\D.*)?", canonical_name(found)):
        raise ValueError(f"{path} is of a run with {found}, and this one trains {student}.")
    may_differ = [*_LENGTH, *AGAINST_DIVERGENCE, "trainer.max_time", "trainer.precision"]  # precision: of the machine
    before = read_record(checkpoint, path)
    changed = changes(before.settings, cfg)
    if before.teacher_sha256 is not None:  # the file may have been moved
        may_differ.append("model.teacher.weights")
    _refuse_other_length(path, changed, checkpoint["lr_schedulers"])
    refuse_changes(f"{path} is of", changed, may_differ)
    return before


def _refuse_other_length(path: Path, changed: Mapping[str, tuple[str, str]], schedules: Sequence[Any]) -> None:
    """Refuses another length of the run if the schedule has had a fixed length from the start."""
    key = next((key for key in _LENGTH if key in changed), None)
    follows = any(name.startswith("recipe.scheduler.") and name not in AGAINST_DIVERGENCE for name in changed)
    if key is None or not (follows or any(map(_has_its_length, schedules))):
        return
    before, now = changed[key]
    had, way_out = f"{key}={before}", f"Continue it with {key}={before}"
    if " " in before:  # the recipe's, which is the default
        had, way_out = f"{before} {key}", f"Leave {key} out"
    raise ValueError(
        f"{path} is of a run with {had}, and this one has {key}={now}: its schedule depends on the length of the run, "
        f"so that all learning rates would have been different. {way_out}; a run that may become longer needs a step "
        "schedule (recipe=cifar240), or none (recipe.scheduler=null)."
    )


def _has_its_length(schedule: Any) -> bool:
    """Whether the state of a schedule, or of a part of it, contains the total number of steps, as one-cycle's does."""
    if not isinstance(schedule, dict):
        return False
    inner = schedule.get("_schedulers", ())
    return "total_steps" in schedule or any(map(_has_its_length, inner if isinstance(inner, list | tuple) else ()))


def _is_version(value: object) -> bool:
    """Whether Lightning can parse the version that wrote a checkpoint."""
    try:
        return isinstance(value, str) and bool(Version(value))
    except InvalidVersion:
        return False


def _read(path: Path) -> dict[str, Any]:
    weights = f"to begin a new run with its weights, use {as_argument('model.student.weights', path)}"
    checkpoint, used = read_checkpoint(path)
    if not checkpoint.get("optimizer_states"):
        raise ValueError(f"{path} has only weights, no optimizer state; take a run's last.ckpt, or {weights}.")
    if not isinstance(checkpoint.get("lr_schedulers"), list) or not _is_version(checkpoint.get(_LIGHTNING)):
        raise ValueError(f"{path} is not a checkpoint to resume from; take a run's last.ckpt, or {weights}.")
    if used != path and not started_by_run():  # otherwise the parent has printed it
        step = f", of step {step}" if type(step := checkpoint.get("global_step")) is int else ""
        print_line("caution", f"{path} is damaged or gone: resuming from the previous one, {used}{step}")
    return checkpoint


def is_over(trainer: Trainer) -> bool:
    """Whether a resumed run has nothing left to train, at the start of fitting, before its position is restored."""
    checkpoint = trainer._checkpoint_connector._loaded_checkpoint
    if trainer.should_stop or not checkpoint:
        return trainer.should_stop
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    ends = ((trainer.max_steps, checkpoint["global_step"]), (trainer.max_epochs, epochs))
    return any(end is not None and 0 <= end <= done for end, done in ends)


def print_nothing_left(trainer: Trainer) -> None:
    """Prints why a resumed run took no step, if it took none."""
    began = next((callback.start_step for callback in callbacks_of(trainer, ExactResume)), None)
    if began is None or trainer.global_step > began:
        return
    if any((left := timer.time_remaining()) is not None and left <= 0 for timer in callbacks_of(trainer, Timer)):
        why = "the time (trainer.max_time) is over; raise it to train on"
    elif has_stopped_early(trainer):
        why = "it has stopped early"
    elif trainer.max_steps == trainer.global_step:
        why = f"all {trainer.max_steps:,} steps (trainer.max_steps) are taken; raise it to train on"
    else:
        why = f"all {trainer.max_epochs} epochs are trained; raise recipe.epochs to train on, where the schedule allows"
    print_line("resume", f"nothing is left to train: {why}")


def run_once(cfg: DictConfig, fit: Callable[[DictConfig], Summary], *, name: str | None) -> Summary:
    """Runs a job unless it is finished; a finished job is only read.

    An interrupted run resumes from its ``last.ckpt``. A failed one writes ``error.txt`` to its directory.

    Args:
        cfg: the configuration; ``paths.run`` is the run's directory, which no other process may use.
        fit: runs the job, with a configuration that includes the checkpoint to resume from.
        name: its name on the console if it is finished, such as ``"student"``; None prints nothing.

    Raises:
        UserError: the run failed, or its directory contains one with other settings.
    """
    run = Path(cfg.paths.run)
    with user_errors():
        refuse_other_settings(run, cfg)
        if (run / SUMMARY).exists():
            if name is not None:
                print_line(name, f"{run} is finished")
            return read_summary(run)
    run.mkdir(parents=True, exist_ok=True)
    goes_on = checkpoint_exists(run / LAST)
    _clear(run, goes_on=goes_on)
    try:
        return fit(with_values(cfg, {"resume": str(run / LAST)}) if goes_on else cfg)
    except UserError as error:
        (run / ERROR).write_text(f"{redact_text(str(error))}\n")
        raise


@rank_zero_only
def _clear(run: Path, *, goes_on: bool) -> None:
    """Removes what a failed attempt has written."""
    (run / ERROR).unlink(missing_ok=True)
    if not goes_on:
        (run / METRICS).unlink(missing_ok=True)  # of an incomplete epoch
