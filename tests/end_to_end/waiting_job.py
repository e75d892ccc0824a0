"""Two ranks that only wait, and the process that starts them; without Lightning, which is slow to import."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf

from rld_lightning.errors import UserError
from rld_lightning.hydra.script import exit_on_user_error
from rld_lightning.tasks.run.processes import run_in_processes


def wait(cfg):
    """Starts a worker, as a data loader does, and waits to be ended; the second rank may fail as ``cfg.event`` says."""
    folder, rank = Path(cfg.paths.run), int(os.environ["RANK"])
    worker = subprocess.Popen(["sleep", "100"])
    _write(folder / f"processes_{rank}.json", json.dumps([os.getpid(), worker.pid]))
    if rank == 1 and cfg.event != "none":
        while not (folder / "processes_0.json").exists():
            time.sleep(0.1)
        time.sleep(0.5)  # so that the test can read both files
        if cfg.event == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {
            "RuntimeError": RuntimeError("the second rank fails"),
            "UserError": UserError("the second rank cannot read its data"),
        }[cfg.event]
    try:
        time.sleep(100)
    finally:
        (folder / f"result_{rank}").touch()


def _write(path, text):
    """Writes a file atomically, because others wait for it."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


if __name__ == "__main__":
    folder, event = sys.argv[1:]
    with exit_on_user_error():
        run_in_processes(2, "waiting_job:wait", OmegaConf.create({"paths": {"run": folder}, "event": event}))
