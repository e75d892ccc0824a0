"""Runs a script: composes the config with Hydra, calls the task, and reports user mistakes in one sentence each."""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rld_lightning.console import print_error, print_line, print_messages_as_lines, quiet_lightning
from rld_lightning.distributed import Stopped, exit_now, stop_on_signals, wait_for_rank_zero
from rld_lightning.errors import UserError, disk_errors, user_errors
from rld_lightning.hydra.checks.mistakes import check, checked
from rld_lightning.hydra.compose import SWEEP, expand_combined_loss, flags_first, prepend_overrides, set_run_folder
from rld_lightning.hydra.options import CONF, register_options
from rld_lightning.hydra.quoting import PATHS, with_quotes
from rld_lightning.hydra.unused_folder import remove_unused_folder
from rld_lightning.package_files import PROGRAM, __version__
from rld_lightning.redact import remember
from rld_lightning.runs.files import CHOICES, HYDRA, OVERRIDES, SWEEPER, write_yaml


def run_task(task: Callable[[DictConfig], float | None], config_name: str, *overrides: str) -> None:
    """Runs ``task`` with the configuration of ``conf/<config_name>.yaml`` and the overrides on the command line.

    The command line takes precedence over ``overrides``.

    Exits with code 2 and a sentence for each mistake of the user; ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    On a signal it exits with code 128 + its number, and one sentence.
    """

    if "--version" in sys.argv[1:]:  # Hydra would print its own
        print(PROGRAM, __version__)
        return
    quiet_lightning()
    if not _only_prints(sys.argv[1:]):
        print_line("start", "composing the configuration, then loading PyTorch and Lightning")
    with exit_on_user_error():
        register_options()
        arguments = flags_first(sys.argv[1:])
        sys.argv[1:] = expand_combined_loss(prepend_overrides(overrides, set_run_folder(with_quotes(arguments))))

    def guarded(cfg: DictConfig) -> float | None:
        release_stderr()
        quiet_lightning()  # again, for processes started by a launcher
        print_messages_as_lines()  # Hydra has just set its own format
        if (job := HydraConfig.get()).job.chdir:
            cfg = with_absolute_paths(cfg, Path(job.runtime.cwd))
        try:
            check(cfg)
            with disk_errors():
                _write_job_config(cfg)
                if cfg.get("print_config") and not is_trial():
                    print_line("config", " ".join(_chosen_options()))
                return task(cfg)
        except UserError as error:
            if not is_trial():
                remove_unused_folder()
            if os.environ.get("HYDRA_FULL_ERROR"):
                raise
            if is_trial():
                raise  # the sweep reports it and continues with the other trials
            print_error(wait_for_rank_zero() + str(error))
            sys.exit(2)

    try:
        if not os.environ.get("HYDRA_FULL_ERROR"):
            sys.stderr = _HeldStderr()
        with stop_on_signals():  # so that launchers of trials also clean up
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()
    except (KeyboardInterrupt, Stopped) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if stopped.signal == signal.SIGINT:  # keeps the log of a job that a cluster ended
            remove_unused_folder()
        if not stopped.reported:
            print_line("stopped", f"by {'Ctrl-C' if stopped.signal == signal.SIGINT else stopped.signal.name}")
        exit_now(128 + stopped.signal)
    except SystemExit as stop:
        if stop.code == 1 and (text := _held_text()):
            with exit_on_user_error():
                _explain(text, config_name)
        if stop.code == 2 and (flags := re.search(r"unrecognized arguments: (.+)", _held_text())):
            _discard_held()
            print_error(
                f"{wait_for_rank_zero()}{flags[1]} is not known. Options are written key=value, as in "
                "recipe.epochs=10: --help lists them, and --hydra-help the flags."
            )
        raise
    finally:
        release_stderr()


def with_absolute_paths(cfg: DictConfig, folder: Path) -> DictConfig:
    """Returns a copy of a config, with its relative paths resolved in a folder."""
    from rld_lightning.models.teacher.teacher_store import SOURCES  # here: imports PyTorch

    other = deepcopy(cfg)
    for key in PATHS:
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(other, group) if group else other
        if not isinstance(node, DictConfig) or name not in node or OmegaConf.is_interpolation(node, name):
            continue
        value = node[name]
        if isinstance(value, str) and value not in SOURCES and "://" not in value and not value.startswith("~"):
            OmegaConf.update(other, key, str(folder / value))
    return other


def _only_prints(arguments: Sequence[str]) -> bool:
    """Whether there is a flag other than ``--multirun``: they all print something and exit."""
    return any(argument.startswith("-") and argument not in SWEEP for argument in arguments)


def _write_job_config(cfg: DictConfig) -> None:
    """Writes a job's ``.hydra`` folder: its config, Hydra's config and the overrides, without secrets.

    Interpolations are kept. The secrets are stored, to redact them in everything that this process writes later.
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    hydra: Any = OmegaConf.to_container(hydra_config, enum_to_str=True)
    remember(OmegaConf.to_container(cfg))
    write_yaml(folder / HYDRA / "config.yaml", OmegaConf.to_container(cfg, enum_to_str=True))
    write_yaml(folder / CHOICES, {"hydra": hydra})
    write_yaml(folder / OVERRIDES, hydra["overrides"]["task"])
    if hydra_config.mode == RunMode.MULTIRUN and (sweep := Path(hydra_config.sweep.dir) / SWEEPER).exists():
        write_yaml(sweep, OmegaConf.to_container(OmegaConf.load(sweep)))  # third-party sweepers write it with secrets


def _chosen_options() -> list[str]:
    """Returns the options of this job's config groups, and the command line's other overrides."""
    hydra = HydraConfig.get()
    choices = [f"{group}={option}" for group, option in reversed(hydra.runtime.choices.items()) if option is not None]
    groups = [choice for choice in choices if not re.match(r"[^=]*[/@]|paths=", choice)]  # without nested groups
    options = {choice.partition("=")[0] for choice in choices}
    return [*groups, *(o for o in hydra.overrides.task if o.lstrip("+").partition("=")[0] not in options)]


def is_trial() -> bool:
    """Whether this job is a trial of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def is_watched() -> bool:
    """Whether this job is a trial of a sweep that shows its own progress in the terminal."""
    return is_trial() and bool(HydraConfig.get().callbacks.get("sweep", {}).get("watch"))


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns what :func:`user_errors` catches into one sentence and exit code 2, for scripts without Hydra."""
    try:
        with user_errors():
            yield
    except UserError as error:
        print_error(wait_for_rank_zero() + str(error))
        sys.exit(2)


def release_stderr() -> None:
    """Writes the held text to stderr and stops holding it, once the config is composed."""
    if isinstance(sys.stderr, _HeldStderr):
        held, sys.stderr = sys.stderr, sys.stderr.stderr
        sys.stderr.write(held.getvalue())


class _HeldStderr(StringIO):
    """Holds what Hydra writes to stderr while it composes: on a mistake, its message or a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.stderr = sys.stderr


def _held_text() -> str:
    return sys.stderr.getvalue() if isinstance(sys.stderr, _HeldStderr) else ""


def _explain(text: str, config_name: str) -> None:
    """Replaces Hydra's error text by our own sentences, if there are any.

    Raises:
        UserError: the sentences.
    """
    try:
        checked(sys.argv[1:], config_name)
    except UserError:
        _discard_held()
        raise
    # Hydra creates the directories of runs and sweeps.
    if match := re.search(
        r"^(?:FileExists|FileNotFound|NotADirectory|Permission|OS)Error: \[Errno \d+\] (.*)$", text, re.MULTILINE
    ):
        _discard_held()
        raise UserError(f"the run directory cannot be made, {match[1]}; choose another (hydra.run.dir, paths.runs).")


def _discard_held() -> None:
    if isinstance(sys.stderr, _HeldStderr):
        sys.stderr = sys.stderr.stderr
