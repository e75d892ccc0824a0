"""Runs a trial of a sweep, once, in its own processes."""

from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rld_lightning.hydra.script import is_watched
from rld_lightning.runs.files import PRINTED
from rld_lightning.runs.folder import locked
from rld_lightning.runs.summary import Summary
from rld_lightning.tasks.fit import fit_in_processes
from rld_lightning.tasks.run.plan import freeze, with_values
from rld_lightning.tasks.run.resume import run_once


def run_trial(cfg: DictConfig) -> Summary:
    """Runs :func:`~rld_lightning.tasks.fit.fit` in fresh processes, once: a finished trial is only read.

    An interrupted trial resumes from its ``last.ckpt``. A failed one writes ``error.txt`` to its directory, and is
    repeated when a grid is continued; Optuna proposes another. Its output goes to ``trial.log`` if the sweep has its
    own live display in the terminal.

    Args:
        cfg: the composed configuration; ``paths.run`` is the trial's directory.

    Raises:
        UserError: the trial failed, its directory contains one with other settings, or another process is running it.
    """
    freeze(cfg)
    own: dict[str, Any] = {"print_config": False}
    if cfg.logger.get("wandb"):  # trials share the pair, the method and often the seed
        own["logger.wandb.name"] = f"${{.group}}-${{method}}-{Path(cfg.paths.run).name}"
    run = Path(cfg.paths.run)
    with locked(run):
        output = run / PRINTED if is_watched() else None
        return run_once(
            with_values(cfg, own), partial(fit_in_processes, output=output), name=None if output else "trial"
        )
