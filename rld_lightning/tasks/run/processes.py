"""Runs with several processes: one parses the command line and monitors, and the ranks train.

Every run, and every trial of a sweep, is a fresh group of processes with the composed configuration and one
directory. They get the environment that ``torchrun`` sets, so that runs work the same either way. Processes of a sweep
are forked from one that has imported everything (:mod:`rld_lightning.forked_processes`). Why not an existing launcher:

- Lightning's makes the process that the user started rank 0 and starts the others with the original command line: in
  a sweep every rank would run its own sweep, and no process reports the error if rank 0 dies.
- torch's (``torch.distributed.elastic``) ends the others by SIGTERM, to which Lightning reacts with a broadcast to
  processes that have ended, and waits 30 s before it kills them; it leaves the data loaders of a killed rank running;
  and it orders failures by whole seconds, and so may name a rank that lost its connection instead of the killed one.
"""

import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

import rld_lightning.hydra.resolvers  # noqa: F401  (resolvers for the configuration that ranks load)
from rld_lightning import forked_processes
from rld_lightning.console import print_line, print_messages_as_lines, quiet_lightning, reset_console, start_new_line
from rld_lightning.distributed import (
    GRACE,
    JOB,
    Stopped,
    exit_now,
    exit_with_parent,
    external_launcher,
    stop_on_signals,
    stopped_by,
    trials_at_once,
    update_rank,
)
from rld_lightning.errors import UserError
from rld_lightning.forked_processes import Process, kill, poll, send_signal, wait_for_end
from rld_lightning.hydra.quoting import as_argument
from rld_lightning.hydra.script import is_trial
from rld_lightning.package_files import package_folder
from rld_lightning.runs.checkpoint import checkpoint_exists
from rld_lightning.runs.files import LAST
from rld_lightning.tasks.run.make import make_trainer

POLL = 0.1  # seconds between checks of the processes while they train


@dataclass(frozen=True)
class Failure:
    """The exception that ended a rank, written by that rank; ``traceback`` is None for a :class:`UserError`."""

    message: str
    traceback: str | None
    time: float


_LIMITS = ("overfit_batches", "limit_train_batches", "limit_val_batches", "limit_test_batches", "val_check_interval")


def processes_to_start(trainer: DictConfig) -> int:
    """Returns how many processes this run must start; 1 if this process trains alone.

    Raises:
        ValueError: ``torchrun`` or ``srun`` has started another number of processes than the trainer requires, or
            started a sweep, or the run needs several nodes and no launcher was used.
    """
    if trainer.devices == 1 and trainer.get("num_nodes", 1) == 1 and external_launcher() is None:
        return 1
    # Imported here, so that ranks end quietly on a Ctrl-C during the import.
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    # Only its number of devices is needed: without a precision, whose check may occupy a GPU, and without options for
    # which Lightning prints lines, as the run's own trainer prints them.
    others = dict.fromkeys(("precision", "fast_dev_run", "detect_anomaly", *_LIMITS))
    probe = make_trainer(trainer, logger=False, enable_checkpointing=False, enable_progress_bar=False, **others)
    wanted = probe.num_devices * probe.num_nodes
    if (launcher := external_launcher()) is not None:
        if wanted != launcher.processes:
            raise ValueError(
                f"{launcher.name} has started {launcher.processes} process(es), but the trainer needs "
                f"{probe.num_devices} on {probe.num_nodes} node(s); omit trainer.devices and trainer.num_nodes "
                "and choose trainer=ddp, or trainer=ddp_cpu without GPUs, which take both from the launcher."
            )
        if is_trial() and launcher.processes > 1 and "SUBMITIT_EXECUTOR" not in os.environ:
            raise ValueError(
                f"--multirun under {launcher.name} would sweep once in each process, each with other values; run it "
                "without: every trial starts its own processes. On several nodes use launcher=submitit_slurm."
            )
        return 1
    if probe.num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={probe.num_nodes} needs a start on every node, by torchrun or srun: see "
            f"{package_folder('scripts') / 'slurm' / 'fit.sbatch'}, or torchrun --nnodes --nproc-per-node "
            "-m rld_lightning fit ... trainer=ddp."
        )
    return probe.num_devices if isinstance(probe.strategy.launcher, _SubprocessScriptLauncher) else 1


def run_in_processes(
    count: int, task: str, cfg: DictConfig, *, resume_hint: str | None = None, output: Path | None = None
) -> None:
    """Runs a task in ``count`` fresh processes and returns when all have ended; never leaves one running.

    Args:
        count: number of processes on this machine.
        task: a function that takes the configuration, as ``package.module:function``.
        cfg: the configuration; ``paths.run`` is the directory that all processes share.
        resume_hint: the override that resumes an interrupted run, to be added to the command; by default the last
            checkpoint in ``paths.run``. For a trial the sweep prints it.
        output: a file to which the processes' output is appended; by default they print to this process's output.

    Raises:
        UserError: a process failed or was killed. The others have been ended, and the message says how to resume.
        Stopped: a signal to this process or a rank stopped the run; ranks had :data:`GRACE` seconds to save. A
            second signal ends them at once.
    """
    run = Path(cfg.paths.run).absolute()
    with TemporaryDirectory(prefix=f"{JOB}-") as scratch:
        folder = Path(scratch)
        OmegaConf.save(OmegaConf.create(_resolve_hydra(cfg)), folder / "config.yaml")
        command = (*forked_processes.PYTHON_M, "rld_lightning.tasks.run.processes", task, str(folder), str(os.getpid()))
        with stop_on_signals(), _running(command, count, output) as processes:
            stop = None
            try:
                codes = _wait(processes)
                if (number := stopped_by(codes.values())) is not None:  # all of them have stopped, or will soon
                    stop = number
                    wait_for_end(processes, GRACE)
            except (KeyboardInterrupt, Stopped) as signalled:
                stop = signalled.signal if isinstance(signalled, Stopped) else signal.SIGINT
                if trials_at_once() is None:  # otherwise the launcher prints it
                    start_new_line()
                    print_line("stopping", "after this step, and saving; once more stops it at once")
                with suppress(KeyboardInterrupt, Stopped):
                    _interrupt(processes)
            if stop is not None:
                hint = resume_hint or _resume_hint(run)
                if hint or not is_trial():  # for a trial the sweep prints it
                    how = f"continue with the same command and {hint}" if hint else "nothing was saved yet"
                    print_line("stopped", how)
                raise Stopped(stop, reported=True)
            if codes:
                time.sleep(5 * POLL)  # the rank that failed first may end last
        if codes:
            failures = _read_failures(folder, count)
            raise UserError(_explain(codes, failures, count, resume_hint or _resume_hint(run), output))


@contextmanager
def _running(command: Sequence[str], count: int, output: Path | None = None) -> Iterator[list[Process]]:
    """Starts the ranks, each in its own session, and at the end kills those that still run."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": JOB,
    }
    processes: list[Process] = []
    # Ranks inherit that SIGUSR1 is ignored until they can save; later it is forwarded to them.
    before = _on_sigusr1(signal.SIG_IGN)
    try:
        for rank in range(count):
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In its own session: this process forwards Ctrl-C, and kills a rank's data loaders with it.
            with output.open("ab") if output else nullcontext() as file:
                processes.append(forked_processes.start(command, environment, file))
        _on_sigusr1(lambda *_: send_signal(processes, signal.SIGUSR1))
        yield processes
    finally:
        _on_sigusr1(before)
        for process in processes:
            kill(process)


def _wait(processes: Sequence[Process]) -> dict[int, int]:
    """Waits until a process fails or all have ended; returns the exit codes of the failed ranks."""
    while True:
        codes = [poll(process) for process in processes]
        failed = {rank: code for rank, code in enumerate(codes) if code}
        if failed or None not in codes:
            return failed
        time.sleep(POLL)


def _on_sigusr1(handler: Any) -> Any:
    """Sets the handler of SIGUSR1, in the main thread only; returns the previous one."""
    main = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGUSR1, handler) if main else signal.getsignal(signal.SIGUSR1)


def _interrupt(processes: Sequence[Process]) -> None:
    """Asks the processes to stop, whatever the signal was, so that they save and loggers finish, and waits for them.

    Uses SIGTERM, which ends processes that are still importing without a traceback.
    """
    send_signal(processes, signal.SIGTERM)
    wait_for_end(processes, GRACE)


def _resume_hint(run: Path) -> str | None:
    """Returns the override that resumes a run; None without a checkpoint, and for a trial, whose sweep prints it."""
    if is_trial():
        return None
    last = run / LAST
    return as_argument("resume", last) if checkpoint_exists(last) else None


def _read_failures(folder: Path, count: int) -> dict[int, Failure]:
    """Reads the failures that ranks wrote before they ended, by rank."""
    failures = {}
    for rank in range(count):
        with suppress(FileNotFoundError, json.JSONDecodeError):  # the rank wrote nothing, or was killed while writing
            failures[rank] = Failure(**json.loads((folder / f"failure_{rank}.json").read_text()))
    return failures


def _explain(
    codes: Mapping[int, int],
    failures: Mapping[int, Failure],
    count: int,
    resume_hint: str | None,
    output: Path | None = None,
) -> str:
    """Describes in one sentence what ended the run; writes an exception's traceback to the processes' output."""
    # Other ranks may fail because of the first, and even end before it. A killed rank has written nothing; a failed one
    # may abort on exit.
    killed = [rank for rank, code in codes.items() if code < 0 and rank not in failures]
    rank, *_ = [*killed, *sorted(failures, key=lambda rank: failures[rank].time), *codes]
    failure = failures.get(rank)
    if failure is None:
        code = codes[rank]
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    elif failure.traceback is None:
        return failure.message
    else:
        with output.open("a") if output else nullcontext(sys.stderr) as file:
            file.write(failure.traceback)
        end = f"failed with {failure.message}"
    advice = " There is no checkpoint yet to continue from."
    if resume_hint:
        advice = f" Continue with the same command and {resume_hint}."
    elif is_trial():
        advice = f" What it printed is in {output}." if output else ""
    if count == 1:
        return f"the process of this run {end}.{advice}"
    return f"rank {rank} of {count} {end}, and the others were ended with it: nothing is left running.{advice}"


def _resolve_hydra(cfg: DictConfig) -> dict[str, Any]:
    """Returns the configuration with its interpolations, except those that only Hydra can resolve."""
    values = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))
    for key, value in values.items():
        if isinstance(value, dict):
            values[key] = _resolve_hydra(cfg[key])
        elif isinstance(value, str) and ("${hydra:" in value or "${choice:" in value):
            values[key] = cfg[key]
    return values


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main(arguments: Sequence[str]) -> int:
    """Runs one rank, and returns its exit status.

    Args:
        arguments: the task, and the folder with the configuration.
    """
    code = _rank(arguments[0], Path(arguments[1]))
    if stopped_by([code]) is not None:
        exit_now(code)
    return code


def _rank(task: str, folder: Path) -> int:
    update_rank()
    reset_console()
    quiet_lightning()
    print_messages_as_lines()
    try:
        module, function = task.split(":")
        with stop_on_signals():
            getattr(importlib.import_module(module), function)(OmegaConf.load(folder / "config.yaml"))
    except KeyboardInterrupt:
        return 130
    except Stopped as stop:
        return int(str(stop.code))
    except UserError as error:
        failure = Failure(str(error), None, time.time())
    except Exception as error:
        failure = Failure(f"{type(error).__name__}: {error}", traceback.format_exc(), time.time())
    else:
        return 0
    (folder / f"failure_{os.environ['RANK']}.json").write_text(json.dumps(asdict(failure)))
    return 1


if __name__ == "__main__":
    exit_with_parent(int(sys.argv[3]))
    sys.exit(main(sys.argv[1:]))
