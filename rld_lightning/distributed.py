"""The processes of a run: which launcher started them, how many there are, and what they agree on."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from itertools import count
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from lightning_utilities.core.rank_zero import rank_zero_only

if TYPE_CHECKING:  # imported on use, so that the command line is parsed without PyTorch
    import torch
    from torch import Tensor

JOB = "rld-lightning"  # TORCHELASTIC_RUN_ID of the processes that a run starts itself
GRACE = 20.0  # seconds that processes have to end after a signal: to finish the step and save
RANK_ZERO_FIRST = 10.0  # seconds that other ranks leave to rank 0 to report an error which all may have found
TRIALS = "RLD_LIGHTNING_TRIALS"  # environment variable for the processes of concurrent trials: the number of trials


def _rank_before_lightning() -> int:
    """Returns the rank that Lightning assumes on import; its strategies set it later, on the same function."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
    return next((int(rank) for rank in ranks if rank is not None), 0)


vars(rank_zero_only).setdefault("rank", _rank_before_lightning())


def update_rank() -> None:
    """Reads the rank from the environment again, in a forked process: it has changed since Lightning was imported."""
    vars(rank_zero_only)["rank"] = _rank_before_lightning()


def is_rank_zero() -> bool:
    """Whether this process is rank 0 of a run, or its only process."""
    return int(vars(rank_zero_only)["rank"]) == 0


class Launcher(NamedTuple):
    """The launcher of a run's processes (``torchrun`` or ``srun``), and how many it started."""

    name: str
    processes: int
    nodes: int


def external_launcher() -> Launcher | None:
    """Returns the launcher that started this process in a group; None if this process starts the others, if any."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        processes = int(env["WORLD_SIZE"])
        return Launcher("torchrun", processes, max(1, processes // int(env.get("LOCAL_WORLD_SIZE", processes))))
    if int(env.get("SLURM_NTASKS", "1")) > 1 and not _interactive():
        return Launcher("srun", int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", "1")))
    return None


def started_by_run() -> bool:
    """Whether a run started this process itself, as one of its ranks."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == JOB


def wait_for_rank_zero() -> str:
    """Gives rank 0 time to report an error that every rank may find; ``torchrun`` or ``srun`` then ends the others.

    Returns:
        a prefix for the message of a rank that still runs, and alone has the error: its number and host.
    """
    launcher = external_launcher()
    if launcher is None or is_rank_zero():
        return ""
    time.sleep(RANK_ZERO_FIRST)
    return f"rank {vars(rank_zero_only)['rank']} of {launcher.processes}, on {socket.gethostname()}: "


def wait_for_all_ranks() -> None:
    """Waits until all ranks of ``torchrun`` are here; a signal ends the wait.

    PyTorch's own wait ignores signals: if a rank has failed, ``torchrun`` would kill the others only half a minute
    later.
    """
    launcher = external_launcher()
    if launcher is None or launcher.name != "torchrun" or launcher.processes == 1 or started_by_run():
        return
    store, _ = _rendezvous()
    key = f"rld-lightning/ready/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_meetings)}"
    store.add(key, 1)
    while store.add(key, 0) < launcher.processes:
        time.sleep(0.1)


def trials_at_once() -> int | None:
    """Returns how many trials of a sweep run at once on this machine; None if this process belongs to none of them."""
    env = os.environ.get(TRIALS, "")
    return int(env) if env.isdecimal() else None


def slurm_job() -> str | None:
    """Returns the SLURM job of this process, as ``scontrol`` names it; None outside a job and in a SLURM shell."""
    env = os.environ
    if "SLURM_JOB_ID" not in env or _interactive():
        return None
    array = env.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"]


def requeued() -> bool:
    """Whether SLURM has requeued and restarted this job."""
    return slurm_job() is not None and int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def _interactive() -> bool:
    """Whether this is an interactive SLURM shell, which has SLURM's variables, too; Lightning uses the same names."""
    return os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")


def devices_per_node(otherwise: int | str) -> int | str:
    """Returns the number of processes that ``torchrun`` or ``srun`` started on this machine, else ``otherwise``."""
    launcher = external_launcher()
    return otherwise if launcher is None else launcher.processes // launcher.nodes


def nodes() -> int:
    """Returns the number of machines on which ``torchrun`` or ``srun`` started the run, else 1."""
    launcher = external_launcher()
    return 1 if launcher is None else launcher.nodes


def unique_name() -> str:
    """Returns a unique directory name: the time, and four random letters for runs started in the same second.

    Processes started by ``torchrun`` agree on one name. In a SLURM job it is the job's and the step's number or,
    without a step, a digest of the command, so that a requeued job finds its directory again.
    """
    launcher = external_launcher()
    if launcher is not None and launcher.name == "torchrun" and launcher.processes > 1:
        return _agreed_name()
    env = os.environ
    if launcher is not None and launcher.processes > 1:
        return f"slurm-{env.get('SLURM_JOB_ID', '0')}.{env.get('SLURM_STEP_ID', '0')}"
    if launcher is None and slurm_job() is not None and not (sys.stdin is not None and sys.stdin.isatty()):
        command = hashlib.sha256("\0".join([str(Path.cwd()), *sys.argv]).encode()).hexdigest()
        return f"slurm-{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID', 'batch')}-{command[:6]}"
    return _new_name()


def _new_name() -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


@cache
def _rendezvous() -> tuple[torch.distributed.Store, int]:
    """Returns the store through which the processes meet; cached, because rank 0 may have to serve it."""
    import torch.distributed

    try:
        store, rank, _ = next(torch.distributed.rendezvous("env://"))
    except torch.distributed.DistNetworkError as error:
        port = os.environ.get("MASTER_PORT")
        raise ConnectionError(
            f"the processes cannot find each other by port {port} ({error}); choose another (torchrun --master-port, "
            "MASTER_PORT)."
        ) from error
    return store, rank


_meetings = count()


@cache
def _agreed_name() -> str:
    store, rank = _rendezvous()
    key = f"rld-lightning/name/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank == 0:
        store.set(key, _new_name())
    return store.get(key).decode()


def gathered(counts: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Returns the counts of every process, on the CPU, in the order of ranks; a collective."""
    import torch.distributed

    own = {name: value.detach().cpu() for name, value in counts.items()}
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    everyone: list[dict[str, Tensor]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def own_part(counts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns this process's part of what was :func:`gathered`, so that the sum over all processes is unchanged.

    With the same number of processes, its own counts; otherwise rank 0 gets the sum of all.
    """
    import torch.distributed

    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)
    if len(counts) == processes:
        return dict(counts[rank])
    total: dict[str, Tensor] = {}
    for part in counts if rank == 0 else ():
        total = {name: value + total[name] if name in total else value for name, value in part.items()}
    return total


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(SystemExit):
    """Raised when a signal stops the run; the exit status is 128 + its number, as in shells.

    Attributes:
        reported: whether the user has already been told, with the command to resume.
    """

    def __init__(self, number: int, *, reported: bool = False) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)
        self.reported = reported


def stopped_by(codes: Iterable[int]) -> int | None:
    """Returns the signal that ended processes with these exit statuses; None if one ended for another reason."""
    numbers = {code - 128 for code in codes}
    return max(numbers) if numbers and numbers <= {*STOPS, signal.SIGUSR1} else None


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise :class:`Stopped`, so that started processes are ended, too, as with Ctrl-C.

    Ignores SIGUSR1, which asks a training run to save: here there is nothing to save yet.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker
            os._exit(128 + number)
        raise Stopped(number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # ignored by nohup, for example
            signal.signal(number, end if number != signal.SIGUSR1 else lambda *_: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_now(code: int) -> NoReturn:
    """Exits at once; the output is flushed, and Python's garbage collection at exit would take seconds."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def exit_with_parent(parent: int) -> None:
    """Kills this process and its data loaders within a second of the parent's end (after SIGKILL, for example)."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
