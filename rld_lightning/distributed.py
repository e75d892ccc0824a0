"""The processes of a run: who has started them, how many there are, and what they agree on."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from lightning_utilities.core.rank_zero import rank_zero_only

if TYPE_CHECKING:  # imported on use: the command line is read without PyTorch
    import torch
    from torch import Tensor

__all__ = [
    "Started",
    "devices_per_node",
    "gathered",
    "nodes",
    "own_share",
    "rank_zero_only",
    "sigterm_ends",
    "started_by",
    "unique_name",
]


def _rank_before_lightning() -> int:
    """As Lightning guesses it when it is imported; its strategies set the rank later, on the same function."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
    return next((int(rank) for rank in ranks if rank is not None), 0)


vars(rank_zero_only).setdefault("rank", _rank_before_lightning())


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
    # Interactive shells of SLURM have its variables as well; Lightning goes by their names, too.
    interactive = known.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if int(known.get("SLURM_NTASKS", "1")) > 1 and not interactive:
        return Started("srun", int(known["SLURM_NTASKS"]), int(known.get("SLURM_NNODES", "1")))
    return None


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

    Processes that ``torchrun`` has started agree on one; those of ``srun`` take the job's and the step's number.
    """
    started = started_by()
    if started is None or started.processes == 1:
        return _new_name()
    if started.by == "srun":
        job = ".".join(os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
        return f"slurm-{job}"
    return _agreed_name()


def _new_name() -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


@cache
def _rendezvous() -> tuple[torch.distributed.Store, int]:
    """The store through which the processes find each other; kept, because rank 0 may have to serve it."""
    import torch.distributed

    store, rank, _ = next(torch.distributed.rendezvous("env://"))
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
