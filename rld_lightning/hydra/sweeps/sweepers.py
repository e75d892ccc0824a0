"""How a sweep runs its trials: all of a grid, or those that a study of Optuna's proposes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from rld_lightning.console import print_line
from rld_lightning.errors import UserError, first_line
from rld_lightning.hydra.quoting import as_argument
from rld_lightning.hydra.script import exit_on_user_error
from rld_lightning.hydra.sweeps.optuna_study import leave_best, open_study, search_space, tell, together
from rld_lightning.runs.events import log_event
from rld_lightning.runs.files import SWEEPER, write_yaml


def sweep_grid(sweeper: BasicSweeper, arguments: Sequence[str]) -> None:
    """Runs every value of each key with every value of the others.

    Raises:
        SystemExit: the trials cannot be run; with one sentence.
    """
    config, launcher, context = sweeper.config, sweeper.launcher, sweeper.hydra_context
    assert config is not None
    assert launcher is not None
    assert context is not None
    with exit_on_user_error():
        overrides = OverridesParser.create(context.config_loader).parse_overrides(
            [*own_params(sweeper.params), *arguments]
        )
        batches = sweeper.split_arguments(overrides, sweeper.max_batch_size)
        _note(config, sum(map(len, batches)))
        first = 0
        for batch in batches:
            _launch(launcher, batch, first, config)
            first += len(batch)


def sweep_study(
    config: DictConfig, launcher: Launcher, loader: ConfigLoader, options: dict[str, Any], arguments: Sequence[str]
) -> None:
    """Runs what an Optuna study proposes, and tells it what came out: a number, or that a trial has failed.

    A study in a storage goes on where it was: what was running when it was interrupted is tried again first.

    Raises:
        SystemExit: a mistake in the options, or the trials cannot be run; with one sentence.
    """
    with exit_on_user_error():
        space, fixed = search_space([*own_params(options.get("params")), *arguments], loader)
        study, to_go = open_study(OmegaConf.create(options), space)
        _note(config, to_go)
        at_once, first = together(options["n_jobs"]), 0
        while to_go > 0:
            trials = [study.ask(space) for _ in range(min(at_once, to_go))]
            lines = [(*(f"{key}={value}" for key, value in trial.params.items()), *fixed) for trial in trials]
            batch = list(dict.fromkeys(lines))  # two with the same values are one, in one folder
            log_event(Path(config.hydra.sweep.dir), total=first + to_go - len(trials) + len(batch))
            returned = dict(zip(batch, _launch(launcher, batch, first, config), strict=True))
            for trial, line in zip(trials, lines, strict=True):
                tell(study, trial, _value(returned[line]))
            first += len(batch)
            to_go -= len(trials)
        leave_best(study, Path(config.hydra.sweep.dir))


def own_params(params: Mapping[str, Any] | None) -> list[str]:
    """A sweeper's own parameters as overrides."""
    return [f"{key}={value}" for key, value in (params or {}).items()]


def _value(returned: JobReturn) -> float | None:
    return returned.return_value if returned.status == JobStatus.COMPLETED else None


def _note(config: DictConfig, total: int) -> None:
    """Leaves the sweep's configuration, without secrets, where Hydra's own sweeper does, and the number of trials."""
    folder = Path(config.hydra.sweep.dir)
    write_yaml(folder / SWEEPER, OmegaConf.to_container(config, enum_to_str=True))
    log_event(folder, total=total)


def _launch(launcher: Launcher, batch: Sequence[Sequence[str]], first: int, config: DictConfig) -> Sequence[JobReturn]:
    """Runs trials.

    Raises:
        SystemExit: the sweep was interrupted; how it goes on has been said.
        UserError: they cannot be run: their configuration is none, or one of the launcher's processes has died.
    """
    try:
        return launcher.launch([list(lines) for lines in batch], initial_job_idx=first)
    except (KeyboardInterrupt, SystemExit) as stop:  # of Ctrl-C, and of SIGTERM
        folder = as_argument("hydra.sweep.dir", config.hydra.sweep.dir)
        print_line("stopped", f"continue with the same command and {folder}")
        raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None
    except Exception as error:  # each launcher has its own
        raise UserError(
            "the trials cannot be run, or a process that ran some has died "
            f"({type(error).__name__}: {first_line(error)}). Continue an interrupted sweep with the same command and "
            f"{as_argument('hydra.sweep.dir', config.hydra.sweep.dir)}."
        ) from error
