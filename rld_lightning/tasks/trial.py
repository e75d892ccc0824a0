"""A trial of a sweep: processes of its own, and a folder in which it continues, or that says why it failed."""

from pathlib import Path

from omegaconf import DictConfig

from rld_lightning.console import print_line
from rld_lightning.distributed import rank_zero_only, started_by
from rld_lightning.errors import UserError, user_errors
from rld_lightning.runs.files import ERROR, SUMMARY
from rld_lightning.runs.folder import locked
from rld_lightning.runs.likeness import refuse_other_settings
from rld_lightning.runs.summary import Summary, read_summary
from rld_lightning.tasks.fit import fit
from rld_lightning.tasks.launch import processes_to_start, run_in_processes


def run_trial(cfg: DictConfig, way_on: str | None = None) -> Summary:
    """Runs :func:`~rld_lightning.tasks.fit.fit` in fresh processes, once: a finished trial is only read.

    A trial that was interrupted goes on from its ``last.ckpt``. One that fails leaves ``error.txt`` in its folder, and
    is tried again when a grid is continued; Optuna proposes another.

    Args:
        cfg: the composed configuration; ``paths.run`` is the trial's folder.
        way_on: what continues an interrupted one when it is added to the command; by default that of a sweep.

    Raises:
        UserError: the trial failed, its folder holds one with other settings, or another process is at it.
    """
    run = Path(cfg.paths.run)
    cfg.print_config = False
    _name_in_wandb(cfg, run)
    with locked(run):
        return _run(cfg, run, way_on)


def _run(cfg: DictConfig, run: Path, way_on: str | None) -> Summary:
    with user_errors():
        refuse_other_settings(run, cfg)
        if (run / SUMMARY).exists():
            print_line("trial", f"{run} is finished")
            return read_summary(run)
    last = run / "last.ckpt"
    if last.exists():
        cfg.resume = str(last)
    _clear(run, goes_on=last.exists())
    try:
        with user_errors():
            processes = processes_to_start(cfg.trainer)
        if started_by() is not None:  # one of the processes that SLURM has started for this trial
            return fit(cfg)
        run_in_processes(processes, "rld_lightning.tasks.fit:fit", cfg, resume_hint=way_on)
        return read_summary(run)
    except UserError as error:
        (run / ERROR).write_text(f"{error}\n")
        raise


def _name_in_wandb(cfg: DictConfig, run: Path) -> None:
    """Trials have the same pair, method and, often, seed; a teacher that one trains has another label and method."""
    if wandb := cfg.logger.get("wandb"):
        wandb.name = f"${{model.label}}-${{method}}-{run.name}"


@rank_zero_only
def _clear(run: Path, *, goes_on: bool) -> None:
    """Clears what a failed attempt has left."""
    (run / ERROR).unlink(missing_ok=True)
    if not goes_on:
        (run / "metrics.csv").unlink(missing_ok=True)  # the beginning of an epoch
