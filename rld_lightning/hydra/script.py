"""The frame of every script: Hydra reads ``conf/``, a task runs, user mistakes end in one sentence."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rld_lightning.console import console, print_error, print_line, quiet_lightning
from rld_lightning.distributed import sigterm_ends
from rld_lightning.errors import UserError, disk_errors, user_errors
from rld_lightning.hydra.compose import compose, expand_combined_loss, in_front
from rld_lightning.hydra.notes import note_job
from rld_lightning.hydra.options import CONF, register_options


def run_task(task: Callable[[DictConfig], float | None], config_name: str, *overrides: str) -> None:
    """Runs ``task`` with the configuration of ``conf/<config_name>.yaml`` and the overrides on the command line.

    ``overrides`` come before those, which therefore win.

    Exits with 2 and one sentence on a :class:`UserError`; ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """

    quiet_lightning()
    if not any(
        re.match(r"--?(?!m$|multirun$)", argument) for argument in sys.argv[1:]
    ):  # of those others read the output
        print_line("start", "rld-lightning: composing the configuration, then loading PyTorch and Lightning")
    try:
        register_options()
        sys.argv[1:] = expand_combined_loss(in_front(overrides, sys.argv[1:]))
    except ValueError as error:
        print_error(str(error))
        sys.exit(2)

    def guarded(cfg: DictConfig) -> float | None:
        quiet_lightning()  # also where a launcher has started another process
        try:
            with disk_errors():
                note_job(cfg)
                return task(cfg)
        except UserError as error:
            if os.environ.get("HYDRA_FULL_ERROR"):
                raise
            if is_trial():
                raise  # to the sweep, which says so, and in which the others go on
            print_error(str(error))
            sys.exit(2)

    try:
        with sigterm_ends():  # launchers of trials, too, clear up behind them
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stop:
        if stop.code == 1:  # Hydra has printed what is wrong with the command line, but not what was meant
            _suggest(config_name)
        raise


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
        print_error(str(error))
        sys.exit(2)


def _suggest(config_name: str) -> None:
    """Names the keys nearest to the overrides that the configuration does not know."""
    given = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
    parser = OverridesParser.create()
    # One configuration has no place for several values of a key.
    overrides = [o for o in given if not parser.parse_override(o).is_sweep_override()]
    unknown: list[str] = []
    while True:
        try:
            values: Any = OmegaConf.to_container(compose(overrides, config_name))
            break
        except HydraException as error:
            found = re.search(r"full_key: (\S+)", f"{error} {error.__cause__}")
            keys = {o: o.lstrip("+~").split("=")[0] for o in overrides}
            bad = [o for o, key in keys.items() if found and f"{key}.".startswith(f"{found[1]}.")]
            if not bad:  # not about a key: Hydra's own message has to do
                return
            unknown += dict.fromkeys(keys[o] for o in bad)
            overrides = [o for o in overrides if o not in bad]
    for key in unknown:
        near = difflib.get_close_matches(key, _keys(values), n=3, cutoff=0.75)
        hint = f"Did you mean {' or '.join(near)}?" if near else "`--cfg job` prints all keys."
        console.print(f"{key} is not known. {hint}", soft_wrap=True, markup=False)


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _keys(value, f"{prefix}{key}.")
    return keys
