"""Runs the trials of a sweep: all points of a grid, or those that an Optuna study proposes."""

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
from rld_lightning.hydra.sweeps.optuna_study import check_n_jobs, open_study, search_space, tell, write_best
from rld_lightning.runs.events import log_event
from rld_lightning.runs.files import SWEEPER, write_yaml


def sweep_grid(sweeper: BasicSweeper, arguments: Sequence[str]) -> None:
    """Runs all combinations of the values.

    Raises:
        SystemExit: the trials cannot run; prints one sentence.
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
        _write_sweep(config, sum(map(len, batches)))
        first = 0
        for batch in batches:
            _launch(launcher, batch, first, config)
            first += len(batch)


def sweep_study(
    config: DictConfig, launcher: Launcher, loader: ConfigLoader, options: dict[str, Any], arguments: Sequence[str]
) -> None:
    """Runs the trials that an Optuna study proposes, and reports each result to it: a number, or a failure.

    A study in a storage is resumed: trials that were running when it was interrupted are repeated first.

    Raises:
        SystemExit: a mistake in the options, or the trials cannot run; prints one sentence.
    """
    with exit_on_user_error():
        space, fixed = search_space([*own_params(options.get("params")), *arguments], loader)
        study, remaining = open_study(OmegaConf.create(options), space)
        _write_sweep(config, remaining)
        n_jobs, first = check_n_jobs(options["n_jobs"]), 0
        while remaining > 0:
            trials = [study.ask(space) for _ in range(min(n_jobs, remaining))]
            lines = [(*(f"{key}={value}" for key, value in trial.params.items()), *fixed) for trial in trials]
            batch = list(dict.fromkeys(lines))  # trials with the same values have the same folder and run once
            log_event(Path(config.hydra.sweep.dir), total=first + remaining - len(trials) + len(batch))
            returned = dict(zip(batch, _launch(launcher, batch, first, config), strict=True))
            for trial, line in zip(trials, lines, strict=True):
                tell(study, trial, _value(returned[line]))
            first += len(batch)
            remaining -= len(trials)
        write_best(study, Path(config.hydra.sweep.dir))


def own_params(params: Mapping[str, Any] | None) -> list[str]:
    """Returns the ``params`` of a sweeper's config as overrides."""
    return [f"{key}={value}" for key, value in (params or {}).items()]


def _value(returned: JobReturn) -> float | None:
    return returned.return_value if returned.status == JobStatus.COMPLETED else None


def _write_sweep(config: DictConfig, total: int) -> None:
    """Writes the sweep's config without secrets, to the path of Hydra's own sweeper, and the number of trials."""
    folder = Path(config.hydra.sweep.dir)
    write_yaml(folder / SWEEPER, OmegaConf.to_container(config, enum_to_str=True))
    log_event(folder, total=total)


def _launch(launcher: Launcher, batch: Sequence[Sequence[str]], first: int, config: DictConfig) -> Sequence[JobReturn]:
    """Runs trials.

    Raises:
        SystemExit: the sweep was interrupted; prints how to resume it.
        UserError: their config is invalid, or one of the launcher's processes has died.
    """
    try:
        return launcher.launch([list(lines) for lines in batch], initial_job_idx=first)
    except (KeyboardInterrupt, SystemExit) as stop:  # Ctrl-C, SIGTERM
        folder = as_argument("hydra.sweep.dir", config.hydra.sweep.dir)
        print_line("stopped", f"continue with the same command and {folder}")
        raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None
    except UserError:  # of the launcher's options, say
        raise
    except Exception as error:  # each launcher raises its own types
        raise UserError(
            "the trials cannot be run, or a process that ran some has died "
            f"({type(error).__name__}: {first_line(error)}). Continue an interrupted sweep with the same command and "
            f"{as_argument('hydra.sweep.dir', config.hydra.sweep.dir)}."
        ) from error
