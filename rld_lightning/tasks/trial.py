"""A trial of a sweep: processes of its own, and a folder in which it continues, or that says why it failed."""

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from rld_lightning.config import started_by
from rld_lightning.console import print_line
from rld_lightning.errors import UserError, user_errors
from rld_lightning.reporting.runs import SUMMARY, Summary, differences, read_summary
from rld_lightning.tasks.fit import fit
from rld_lightning.tasks.launch import processes_to_start, run_in_processes

ERROR = "error.txt"


def run_trial(cfg: DictConfig) -> Summary:
    """Runs :func:`~rld_lightning.tasks.fit.fit` in fresh processes, once: a finished trial is only read.

    A trial that was interrupted goes on from its ``last.ckpt``. One that fails leaves ``error.txt`` in its folder, and
    is tried again when the sweep is continued.

    Args:
        cfg: the composed configuration; ``paths.run`` is the trial's folder.

    Raises:
        UserError: the trial failed, or its folder holds one with other settings.
    """
    run = Path(cfg.paths.run)
    cfg.print_config = False
    with user_errors():
        if _is_finished(cfg, run):
            print_line("trial", f"{run} is finished")
            return read_summary(run)
    _prepare(cfg, run)
    try:
        with user_errors():
            processes = processes_to_start(cfg.trainer)
        if started_by() is None:
            run_in_processes(processes, "rld_lightning.tasks.fit:fit", cfg)
        else:  # one of the processes that SLURM has started for this trial
            fit(cfg)
        return read_summary(run)
    except UserError as error:
        (run / ERROR).write_text(f"{error}\n")
        raise


def _is_finished(cfg: DictConfig, run: Path) -> bool:
    if not (run / "config.yaml").exists():
        return False
    there = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    here = OmegaConf.to_container(cfg, resolve=True)
    if here["model"]["teacher"] and here["model"]["teacher"]["weights"] in ("auto", "fit", "published"):
        here["model"]["teacher"]["weights"] = there["model"]["teacher"]["weights"]  # which file that was
    if changed := differences(there, here):
        key, (before, now) = next(iter(changed.items()))
        raise ValueError(
            f"{run} holds a run with {key}={before}, and this one has {key}={now}: continue it with the command that "
            "began it, or choose another folder."
        )
    return (run / SUMMARY).exists()


@rank_zero_only
def _prepare(cfg: DictConfig, run: Path) -> None:
    """Sets ``cfg.resume`` where there is something to go on from, and clears what a failed attempt has left."""
    (run / ERROR).unlink(missing_ok=True)
    if (run / "last.ckpt").exists():
        cfg.resume = str(run / "last.ckpt")
    else:
        (run / "metrics.csv").unlink(missing_ok=True)  # the beginning of an epoch
