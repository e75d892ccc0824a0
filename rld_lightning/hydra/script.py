"""The frame of every script: Hydra reads ``conf/``, a task runs, user mistakes end in one sentence."""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rld_lightning.console import print_error, print_line, quiet_lightning
from rld_lightning.distributed import Stopped, exit_now, stop_on_signals, wait_for_rank_zero
from rld_lightning.errors import UserError, disk_errors, user_errors
from rld_lightning.hydra.checks.mistakes import check, checked
from rld_lightning.hydra.cleared import clear_mistake
from rld_lightning.hydra.compose import SWEEP, expand_combined_loss, flags_first, in_front, with_own_folder
from rld_lightning.hydra.options import CONF, register_options
from rld_lightning.hydra.paths import anchored
from rld_lightning.hydra.quoting import with_quotes
from rld_lightning.redact import remember
from rld_lightning.runs.files import CHOICES, HYDRA, OVERRIDES, SWEEPER, write_yaml


def run_task(task: Callable[[DictConfig], float | None], config_name: str, *overrides: str) -> None:
    """Runs ``task`` with the configuration of ``conf/<config_name>.yaml`` and the overrides on the command line.

    ``overrides`` come before those, which therefore win.

    Exits with 2 and a sentence for each mistake of the user's; ``HYDRA_FULL_ERROR=1`` shows the traceback instead. On a
    signal it exits with 128 + its number, and one sentence.
    """

    quiet_lightning()
    if not _is_read_by_others(sys.argv[1:]):
        print_line("start", "composing the configuration, then loading PyTorch and Lightning")
    with exit_on_user_error():
        register_options()
        arguments = flags_first(sys.argv[1:])
        sys.argv[1:] = expand_combined_loss(in_front(overrides, with_own_folder(with_quotes(arguments))))

    def guarded(cfg: DictConfig) -> float | None:
        composed()
        quiet_lightning()  # also where a launcher has started another process
        if (job := HydraConfig.get()).job.chdir:
            cfg = anchored(cfg, Path(job.runtime.cwd))
        try:
            check(cfg)
            with disk_errors():
                _note_job(cfg)
                if cfg.get("print_config") and not is_trial():
                    print_line("config", " ".join(chosen()))
                return task(cfg)
        except UserError as error:
            if not is_trial():
                clear_mistake()
            if os.environ.get("HYDRA_FULL_ERROR"):
                raise
            if is_trial():
                raise  # to the sweep, which says so, and in which the others go on
            print_error(wait_for_rank_zero() + str(error))
            sys.exit(2)

    try:
        if not os.environ.get("HYDRA_FULL_ERROR"):
            sys.stderr = _HydrasWords()
        with stop_on_signals():  # launchers of trials, too, clear up behind them
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()
    except (KeyboardInterrupt, Stopped) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if stopped.signal == signal.SIGINT:  # not one of a cluster, which is to be explained
            clear_mistake()
        if not stopped.said:
            print_line("stopped", f"by {'Ctrl-C' if stopped.signal == signal.SIGINT else stopped.signal.name}")
        exit_now(128 + stopped.signal)
    except SystemExit as stop:
        if stop.code == 1 and (words := _held()):
            with exit_on_user_error():
                _explain(words, config_name)
        if stop.code == 2 and (flags := re.search(r"unrecognized arguments: (.+)", _held())):
            _forget()
            print_error(
                f"{wait_for_rank_zero()}{flags[1]} is not known. Options are written key=value, as in "
                "recipe.epochs=10: --help lists them, and --hydra-help the flags."
            )
        raise
    finally:
        composed()


def _is_read_by_others(arguments: Sequence[str]) -> bool:
    """Whether there are flags, all of which but ``--multirun`` ask for something to be printed."""
    return any(argument.startswith("-") and argument not in SWEEP for argument in arguments)


def _note_job(cfg: DictConfig) -> None:
    """Writes a job's ``.hydra``: its configuration, Hydra's own and the overrides, without secrets.

    Interpolations are kept. The secrets are remembered for whatever this process writes later.
    """
    own = HydraConfig.get()
    folder = Path(own.runtime.output_dir)
    hydra: Any = OmegaConf.to_container(own, enum_to_str=True)
    remember(OmegaConf.to_container(cfg))
    write_yaml(folder / HYDRA / "config.yaml", OmegaConf.to_container(cfg, enum_to_str=True))
    write_yaml(folder / CHOICES, {"hydra": hydra})
    write_yaml(folder / OVERRIDES, hydra["overrides"]["task"])
    if own.mode == RunMode.MULTIRUN and (sweep := Path(own.sweep.dir) / SWEEPER).exists():
        write_yaml(sweep, OmegaConf.to_container(OmegaConf.load(sweep)))  # as sweepers of others write it


def chosen() -> list[str]:
    """The options that make up the configuration of this job, and what else the command line says."""
    own = HydraConfig.get()
    choices = [f"{group}={option}" for group, option in reversed(own.runtime.choices.items()) if option is not None]
    groups = [choice for choice in choices if not re.match(r"[^=]*[/@]|paths=", choice)]  # neither within others
    options = {choice.partition("=")[0] for choice in choices}
    return [*groups, *(o for o in own.overrides.task if o.lstrip("+").partition("=")[0] not in options)]


def is_trial() -> bool:
    """Whether Hydra runs this job as one of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def is_watched() -> bool:
    """Whether this job is a trial of a sweep that has the terminal for its own lines."""
    return is_trial() and bool(HydraConfig.get().callbacks.get("sweep", {}).get("watch"))


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """For scripts without Hydra: what :func:`user_errors` catches ends in one sentence and exit code 2."""
    try:
        with user_errors():
            yield
    except UserError as error:
        print_error(wait_for_rank_zero() + str(error))
        sys.exit(2)


def composed() -> None:
    """Says that there is a configuration: from here on, what anybody writes to stderr is shown as it comes."""
    if isinstance(sys.stderr, _HydrasWords):
        held, sys.stderr = sys.stderr, sys.stderr.stderr
        sys.stderr.write(held.getvalue())


class _HydrasWords(StringIO):
    """What Hydra writes to stderr while it composes: on a mistake, its view of it, or a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.stderr = sys.stderr


def _held() -> str:
    return sys.stderr.getvalue() if isinstance(sys.stderr, _HydrasWords) else ""


def _explain(words: str, config_name: str) -> None:
    """Says in sentences what Hydra has ended with; leaves its own words alone where there are none.

    Raises:
        UserError: the sentences.
    """
    try:
        checked(sys.argv[1:], config_name)
    except UserError:
        _forget()
        raise
    # The folders of runs and sweeps are made by Hydra.
    if found := re.search(
        r"^(?:FileExists|FileNotFound|NotADirectory|Permission|OS)Error: \[Errno \d+\] (.*)$", words, re.MULTILINE
    ):
        _forget()
        raise UserError(f"the run's folder cannot be made, {found[1]}; choose another (hydra.run.dir, paths.runs).")


def _forget() -> None:
    if isinstance(sys.stderr, _HydrasWords):
        sys.stderr = sys.stderr.stderr
