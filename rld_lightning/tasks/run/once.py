"""A run that happens once, however often it is asked for: it is begun, goes on where it was, or is finished."""

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from rld_lightning.console import print_line
from rld_lightning.distributed import rank_zero_only
from rld_lightning.errors import UserError, user_errors
from rld_lightning.redact import redact_text
from rld_lightning.runs.checkpoint import is_there
from rld_lightning.runs.files import ERROR, LAST, METRICS, SUMMARY
from rld_lightning.runs.likeness import refuse_other_settings
from rld_lightning.runs.summary import Summary, read_summary
from rld_lightning.tasks.run.plan import changed


def run_once(cfg: DictConfig, fit: Callable[[DictConfig], Summary], *, name: str | None) -> Summary:
    """Runs what is not finished yet; what is finished is only read.

    A run that was interrupted goes on from its ``last.ckpt``. One that fails leaves ``error.txt`` in its folder.

    Args:
        cfg: the configuration; ``paths.run`` is the run's folder, which no other process may be at.
        fit: does the run, with a configuration that says what it goes on from.
        name: what the console calls it where it is finished, such as ``"student"``; None says nothing.

    Raises:
        UserError: the run failed, or its folder holds one with other settings.
    """
    run = Path(cfg.paths.run)
    with user_errors():
        refuse_other_settings(run, cfg)
        if (run / SUMMARY).exists():
            if name is not None:
                print_line(name, f"{run} is finished")
            return read_summary(run)
    run.mkdir(parents=True, exist_ok=True)
    goes_on = is_there(run / LAST)
    _clear(run, goes_on=goes_on)
    try:
        return fit(changed(cfg, {"resume": str(run / LAST)}) if goes_on else cfg)
    except UserError as error:
        (run / ERROR).write_text(f"{redact_text(str(error))}\n")
        raise


@rank_zero_only
def _clear(run: Path, *, goes_on: bool) -> None:
    """Clears what a failed attempt has left."""
    (run / ERROR).unlink(missing_ok=True)
    if not goes_on:
        (run / METRICS).unlink(missing_ok=True)  # the beginning of an epoch
