"""Starting ``scripts/fit.py`` from a program: a sweep as a process of its own, and a teacher that others wait for."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rld_lightning.errors import UserError
from rld_lightning.reporting.runs import SUMMARY
from rld_lightning.tasks.launch import sigterm_ends

FIT = Path(__file__).resolve().parents[2] / "scripts" / "fit.py"


def run_sweep(overrides: Sequence[str], folder: Path, subfolder: str) -> int:
    """Runs ``scripts/fit.py --multirun``, whose trials go on where they were; it ends with this process.

    Args:
        overrides: those of the sweep.
        folder: where it lies.
        subfolder: of a trial in it, with Hydra's interpolations; ``.`` for a single one.

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


def train_teacher(overrides: Sequence[str], name: str, seed: int, folder: Path) -> Path:
    """Trains a teacher with cross-entropy, as a run of its own, or goes on with it, or finds it finished.

    Args:
        overrides: those of the runs that it is for; what is about their model, loss and launcher is left out.
        name: its network's.
        seed: its seed.
        folder: its run folder.

    Returns:
        the file of its weights.

    Raises:
        UserError: it failed, and has said why.
        SystemExit: it was interrupted.
    """
    others = [
        override
        for override in overrides
        if not re.match(r"[+~]*(model|loss|launcher|hydra|seed|sweep|experiment)\b", override)
    ]
    own = ["model=single", f"model.student.name={name}", "loss=ce", f"seed={seed}"]
    status = run_sweep([*own, *others], folder, ".")
    if status == 130:
        sys.exit(status)
    weights = folder / "student.safetensors"
    if status or not (folder / SUMMARY).exists():
        raise UserError(f"the teacher {name} could not be trained in {folder}.")
    return weights
