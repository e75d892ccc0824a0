"""The processes of a run: who has started them, how many there are, and what they agree on."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from lightning_utilities.core.rank_zero import rank_zero_only

if TYPE_CHECKING:  # imported on use: the command line is read without PyTorch
    import torch
    from torch import Tensor

JOB = "rld-lightning"  # TORCHELASTIC_RUN_ID of the processes that a run starts itself
GRACE = 20.0  # seconds that processes have to end by themselves after a signal: to the end of a step, and to save
TRIALS = "RLD_LIGHTNING_TRIALS"  # for the processes of trials that run side by side: how many do


def _rank_before_lightning() -> int:
    """As Lightning guesses it when it is imported; its strategies set the rank later, on the same function."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
    return next((int(rank) for rank in ranks if rank is not None), 0)


vars(rank_zero_only).setdefault("rank", _rank_before_lightning())


def look_for_rank() -> None:
    """Takes the rank from the environment, which was another one when Lightning was imported in what was forked."""
    vars(rank_zero_only)["rank"] = _rank_before_lightning()


def is_first() -> bool:
    """Whether this is rank 0 of a run, or its only process."""
    return int(vars(rank_zero_only)["rank"]) == 0


class Started(NamedTuple):
    """Who has started the processes of a run, and how many: ``torchrun``, or ``srun``."""

    by: str
    processes: int
    nodes: int


def started_by() -> Started | None:
    """Who has started this process as one of a group; None when this process is to start the others, if any."""
    known = os.environ
    if "TORCHELASTIC_RUN_ID" in known:
        processes = int(known["WORLD_SIZE"])
        return Started("torchrun", processes, max(1, processes // int(known.get("LOCAL_WORLD_SIZE", processes))))
    if int(known.get("SLURM_NTASKS", "1")) > 1 and not _interactive():
        return Started("srun", int(known["SLURM_NTASKS"]), int(known.get("SLURM_NNODES", "1")))
    return None


def started_here() -> bool:
    """Whether this process is one of those that a run has started itself."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == JOB


def trials_at_once() -> int | None:
    """How many trials of a sweep run side by side on this machine, where this process belongs to one; else None."""
    known = os.environ.get(TRIALS, "")
    return int(known) if known.isdecimal() else None


def slurm_job() -> str | None:
    """The job of SLURM that this process belongs to, as ``scontrol`` calls it; None outside of one, or in its shell."""
    known = os.environ
    if "SLURM_JOB_ID" not in known or _interactive():
        return None
    array = known.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{known['SLURM_ARRAY_TASK_ID']}" if array else known["SLURM_JOB_ID"]


def requeued() -> bool:
    """Whether SLURM has started this job again, after it was put back in the queue."""
    return slurm_job() is not None and int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def _interactive() -> bool:
    """Whether this is a shell of SLURM, which has its variables as well; Lightning goes by their names, too."""
    return os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")


def devices_per_node(otherwise: int | str) -> int | str:
    """How many processes ``torchrun`` or ``srun`` has started on this machine, else ``otherwise``."""
    started = started_by()
    return otherwise if started is None else started.processes // started.nodes


def nodes() -> int:
    """On how many machines ``torchrun`` or ``srun`` has started the run, else 1."""
    started = started_by()
    return 1 if started is None else started.nodes


def unique_name() -> str:
    """A folder name that no other run has: the time, and four random letters for runs of the same second.

    Processes that ``torchrun`` has started agree on one. In a job of SLURM it is the job's and the step's number, and
    where no step was started, a digest of the command: a job that is put back in the queue finds its folder again.
    """
    started = started_by()
    if started is not None and started.by == "torchrun" and started.processes > 1:
        return _agreed_name()
    known = os.environ
    if started is not None and started.processes > 1:
        return f"slurm-{known.get('SLURM_JOB_ID', '0')}.{known.get('SLURM_STEP_ID', '0')}"
    if started is None and slurm_job() is not None and not (sys.stdin is not None and sys.stdin.isatty()):
        command = hashlib.sha256("\0".join([str(Path.cwd()), *sys.argv]).encode()).hexdigest()
        return f"slurm-{known['SLURM_JOB_ID']}.{known.get('SLURM_STEP_ID', 'batch')}-{command[:6]}"
    return _new_name()


def _new_name() -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


@cache
def _rendezvous() -> tuple[torch.distributed.Store, int]:
    """The store through which the processes find each other; kept, because rank 0 may have to serve it."""
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


@cache
def _agreed_name() -> str:
    store, rank = _rendezvous()
    key = f"rld-lightning/name/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank == 0:
        store.set(key, _new_name())
    return store.get(key).decode()


def gathered(counts: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What each process of the run has counted, on the CPU, in the order of their ranks: a collective."""
    import torch.distributed

    own = {name: value.detach().cpu() for name, value in counts.items()}
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    everyone: list[dict[str, Tensor]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def own_share(counts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The part of this process in what was :func:`gathered`, so that the sum over the processes is as it was.

    Its own where there are as many processes as then; otherwise the first takes all.
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
    """A signal has ended the run; the exit status is 128 + its number, as shells have it.

    Attributes:
        said: whether the user has been told, and how to go on.
    """

    def __init__(self, number: int, *, said: bool = False) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)
        self.said = said


def stopped_by(codes: Iterable[int]) -> int | None:
    """The signal that ended processes with these exit statuses; None where something else ended one."""
    numbers = {code - 128 for code in codes}
    return max(numbers) if numbers and numbers <= {*STOPS, signal.SIGUSR1} else None


@contextmanager
def signals_end() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end this process as Ctrl-C does, and not without the processes that it has started.

    SIGUSR1, which asks a run that trains to save, is not the end of one that has nothing to save yet.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker that was forked
            os._exit(128 + number)
        raise Stopped(number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # by nohup, say
            signal.signal(number, end if number != signal.SIGUSR1 else lambda *_: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(code: int) -> NoReturn:
    """Ends this process now: what is written is on its way, and Python would collect its garbage for seconds."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def end_with(parent: int) -> None:
    """Ends this process and its data loaders within a second when its parent is gone, killed for example."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
