"""A trial of a sweep: a run that happens once, in processes of its own."""

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

    A trial that was interrupted goes on from its ``last.ckpt``. One that fails leaves ``error.txt`` in its folder, and
    is tried again when a grid is continued; Optuna proposes another. What it prints goes into ``trial.log``, where the
    sweep has a line of its own in the terminal.

    Args:
        cfg: the composed configuration; ``paths.run`` is the trial's folder.

    Raises:
        UserError: the trial failed, its folder holds one with other settings, or another process is at it.
    """
    freeze(cfg)
    own: dict[str, Any] = {"print_config": False}
    if cfg.logger.get("wandb"):  # trials have the same pair, method and, often, seed
        own["logger.wandb.name"] = f"${{.group}}-${{method}}-{Path(cfg.paths.run).name}"
    run = Path(cfg.paths.run)
    with locked(run):
        output = run / PRINTED if is_watched() else None
        return run_once(
            with_values(cfg, own), partial(fit_in_processes, output=output), name=None if output else "trial"
        )
