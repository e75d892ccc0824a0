"""Starting runs from a program: a sweep as a process of its own, and a teacher that others wait for."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from rld_lightning.distributed import started_by
from rld_lightning.errors import UserError
from rld_lightning.tasks.launch import sigterm_ends
from rld_lightning.tasks.teacher import teacher_config
from rld_lightning.tasks.trial import run_trial

FIT = Path(__file__).resolve().parents[2] / "scripts" / "fit.py"


def run_sweep(overrides: Sequence[str], folder: Path, subfolder: str) -> int:
    """Runs ``scripts/fit.py --multirun``, whose trials go on where they were; it ends with this process.

    Args:
        overrides: those of the sweep.
        folder: where it lies.
        subfolder: of a trial in it, with Hydra's interpolations.

    Returns:
        the exit status; 130 when it was interrupted.
    """
    places = [f"hydra.sweep.dir={folder}", f"hydra.sweep.subdir='{subfolder}'"]
    command = [sys.executable, FIT, "-m", *overrides, *places]
    # A session of its own: Ctrl-C in a terminal is ours to pass on, and to wait for what it still has to write.
    with sigterm_ends(), subprocess.Popen(command, start_new_session=True) as process:
        try:
            return process.wait()
        except (KeyboardInterrupt, SystemExit):
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
            return 130


def train_teacher(cfg: DictConfig, folder: Path, way_on: str) -> Path:
    """Trains the teacher of runs to come, as a run of its own, or goes on with it, or finds it finished.

    Args:
        cfg: the configuration of the runs that it is for.
        folder: its own run folder.
        way_on: what continues an interrupted one when it is added to the command.

    Returns:
        the file of its weights.

    Raises:
        UserError: it failed.
        SystemExit: it was interrupted.
    """
    name = cfg.model.teacher.name
    if (started := started_by()) is not None and started.processes > 1:
        raise UserError(f"the teacher {name} starts its own processes; start this without {started.by}.")
    try:
        run_trial(teacher_config(cfg, folder.absolute()), way_on)
    except UserError as error:
        raise UserError(f"the teacher {name} could not be trained in {folder}: {error}") from error
    return folder / "student.safetensors"
