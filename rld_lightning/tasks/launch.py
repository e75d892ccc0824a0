"""A run with several processes: one that reads the command line and watches, and the ranks that train.

Not Lightning's own launcher, where the process that the user started is rank 0 and starts the others with the original
command line: in a sweep every rank would then sweep on its own, and nobody is left to say what happened when rank 0
dies. Here every run, and every trial of a sweep, is a fresh group of processes with the composed configuration and one
folder. They get the environment that ``torchrun`` gives, so that there is one way to run and two to start.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from omegaconf import DictConfig, OmegaConf

from rld_lightning.console import print_line
from rld_lightning.distributed import started_by
from rld_lightning.errors import UserError

JOB = "rld-lightning"  # what TORCHELASTIC_RUN_ID says in the processes that are started here
POLL = 0.1  # seconds between two looks at the processes
GRACE = 10.0  # seconds that processes have to end by themselves after Ctrl-C


@dataclass(frozen=True)
class Failure:
    """What a rank says before it ends; ``traceback`` is None where the message is the whole story."""

    message: str
    traceback: str | None
    time: float


def processes_to_start(trainer: DictConfig) -> int:
    """How many processes a run needs that nobody has started yet; 1 where this process does it alone.

    Args:
        trainer: the trainer's part of the configuration.

    Raises:
        ValueError: ``torchrun`` or ``srun`` has started another number of processes than the trainer wants, a sweep was
            started with them, or the run needs several nodes and nobody has started the others.
    """
    if trainer.devices == 1 and trainer.get("num_nodes", 1) == 1 and started_by() is None:
        return 1
    # Its device count alone is of interest: no precision, which may have to ask, and so occupy, a GPU.
    probe: Trainer = instantiate(
        trainer, precision=None, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    wanted = probe.num_devices * probe.num_nodes
    if (started := started_by()) is not None:
        if wanted != started.processes:
            raise ValueError(
                f"{started.by} has started {started.processes} process(es) and the trainer wants {probe.num_devices} "
                f"on {probe.num_nodes} node(s); leave trainer.devices and trainer.num_nodes away and choose "
                "trainer=ddp, or trainer=ddp_cpu without GPUs, which take both from there."
            )
        if is_trial() and started.processes > 1 and "SUBMITIT_EXECUTOR" not in os.environ:
            raise ValueError(
                f"--multirun under {started.by} would sweep once in each process, each with other values; start it "
                "without: every trial starts its own processes. On several nodes use launcher=submitit_slurm."
            )
        return 1
    if probe.num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={probe.num_nodes} has to be started on every node, by torchrun or srun: see "
            "scripts/slurm/fit.sbatch, or torchrun --nnodes --nproc-per-node scripts/fit.py ... trainer=ddp."
        )
    return probe.num_devices if isinstance(probe.strategy.launcher, _SubprocessScriptLauncher) else 1


def started_here() -> bool:
    """Whether this process is a rank that :func:`run_in_processes` has started."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == JOB


def is_trial() -> bool:
    """Whether Hydra runs this job as one of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def run_in_processes(count: int, task: str, cfg: DictConfig, *, way_on: str | None = None) -> None:
    """Runs a task in ``count`` fresh processes and returns when all have ended; none is left whatever happens.

    Args:
        count: number of processes on this machine.
        task: a function that takes the configuration, as ``package.module:function``.
        cfg: the configuration; ``paths.run`` is the folder that all of them share.
        way_on: what continues an interrupted run when it is added to the command; by default what the command's kind
            of run takes, a sweep or a single one.

    Raises:
        UserError: a process failed or was killed. The others have been ended, and the message says how to continue.
        SystemExit: the run was interrupted; its processes had :data:`GRACE` seconds to leave their results.
    """
    find_way_on = (lambda: way_on) if way_on else _way_on(Path(cfg.paths.run).absolute() / "last.ckpt")
    with TemporaryDirectory(prefix=f"{JOB}-") as scratch:
        folder = Path(scratch)
        OmegaConf.save(OmegaConf.create(_without_hydra(cfg)), folder / "config.yaml")
        command = (sys.executable, "-m", "rld_lightning.tasks.launch", task, str(folder))
        with sigterm_ends(), _started(command, count) as processes:
            try:
                failed = _wait(processes)
            except (KeyboardInterrupt, SystemExit):
                _interrupt(processes)
                if hint := find_way_on():
                    print_line("stopped", f"continue with the same command and {hint}")
                sys.exit(130)
            if failed:
                time.sleep(5 * POLL)
                said = {rank: told for rank in range(count) if (told := _read_failure(folder, rank)) is not None}
        if failed:
            raise UserError(_explain({rank: processes[rank].returncode for rank in failed}, said, count, find_way_on()))


@contextmanager
def _started(command: Sequence[str], count: int) -> Iterator[list[subprocess.Popen]]:
    """Starts the ranks, each in a session of its own, and kills what is left of them in the end."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": JOB,
    }
    processes = []
    try:
        for rank in range(count):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of its own: Ctrl-C in a terminal is ours to pass on, and its data loaders can be ended with it.
            processes.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
            )
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(processes: Sequence[subprocess.Popen]) -> list[int]:
    """Waits until all have ended well, then returns nothing, or some have not, then those."""
    while True:
        codes = [process.poll() for process in processes]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            return failed
        if all(code == 0 for code in codes):
            return []
        time.sleep(POLL)


def _interrupt(processes: Sequence[subprocess.Popen]) -> None:
    """Passes Ctrl-C on, so that loggers can finish, and waits a little."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    until = time.monotonic() + GRACE
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        time.sleep(POLL)


@contextmanager
def sigterm_ends() -> Iterator[None]:
    """Lets SIGTERM end this process as Ctrl-C does, and not without the processes that it has started."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _way_on(last: Path) -> Callable[[], str | None]:
    """What to add to the command to continue, asked when it is needed: the checkpoint may not be there yet."""
    if is_trial():
        folder = HydraConfig.get().sweep.dir  # trials go on by themselves
        return lambda: f"hydra.sweep.dir={folder}"
    return lambda: f"resume={last}" if last.exists() else None


def _explain(failed: Mapping[int, int], said: Mapping[int, Failure], count: int, hint: str | None) -> str:
    """One sentence about what ended the run; the traceback of an exception goes to stderr."""
    killed = [rank for rank, code in failed.items() if code < 0]
    # The others may fail because of the first, and even end before it.
    rank = (killed or sorted(said, key=lambda rank: said[rank].time) or list(failed))[0]
    told = None if killed else said.get(rank)
    if told is not None and told.traceback is None:
        return told.message
    if told is not None:
        sys.stderr.write(told.traceback)
        how = f"failed with {told.message}"
    elif killed:
        how = f"was killed by {signal.Signals(-failed[rank]).name}"
    else:
        how = f"ended with exit status {failed[rank]}"
    way_on = f"Continue with the same command and {hint}" if hint else "There is no checkpoint yet to continue from"
    if count == 1:
        return f"the process of this run {how}. {way_on}."
    return f"rank {rank} of {count} {how}, and the others were ended with it: nothing is left running. {way_on}."


def _without_hydra(cfg: DictConfig) -> dict[str, Any]:
    """The configuration with its interpolations, which a run still uses, but for those that only Hydra can answer."""

    def settle(raw: dict[str, Any], node: DictConfig) -> dict[str, Any]:
        for key, value in raw.items():
            if isinstance(value, dict):
                settle(value, node[key])
            elif isinstance(value, str) and "${hydra:" in value:
                raw[key] = node[key]
        return raw

    return settle(OmegaConf.to_container(cfg, resolve=False), cfg)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _read_failure(folder: Path, rank: int) -> Failure | None:
    try:
        return Failure(**json.loads((folder / f"failure_{rank}.json").read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _rank(task: str, folder: Path) -> int:
    """Does the work of one process; its exit status."""
    from rld_lightning.console import quiet_lightning

    _end_with_parent()
    quiet_lightning()
    try:
        module, function = task.split(":")
        getattr(importlib.import_module(module), function)(OmegaConf.load(folder / "config.yaml"))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        said = isinstance(error, UserError)
        failure = Failure(
            message=str(error) if said else f"{type(error).__name__}: {error}",
            traceback=None if said else traceback.format_exc(),
            time=time.time(),
        )
        (folder / f"failure_{os.environ['RANK']}.json").write_text(json.dumps(asdict(failure)))
        return 1
    return 0


def _end_with_parent() -> None:
    """Ends this process, and its data loaders, soon after the one that watches over it was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


if __name__ == "__main__":
    sys.exit(_rank(sys.argv[1], Path(sys.argv[2])))
