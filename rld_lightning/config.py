"""What the YAML files in ``conf/`` can call: resolvers, registered by importing this module."""

import os
import secrets
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf


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
    store, rank, _ = next(torch.distributed.rendezvous("env://"))
    return store, rank


@cache
def _agreed_name() -> str:
    store, rank = _rendezvous()
    key = f"rld-lightning/name/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank == 0:
        store.set(key, _new_name())
    return store.get(key).decode()


def fast_precision(accelerator: str = "auto") -> str:
    """Lightning's ``bf16-mixed`` where bfloat16 has instructions of its own, ``32-true`` elsewhere.

    That is NVIDIA GPUs from compute capability 8.0 on, and CPUs with AVX512-BF16 or AMX.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        fast = torch.cuda.get_device_capability() >= (8, 0)
    else:
        fast = accelerator in ("auto", "cpu") and _cpu_has_bfloat16()
    return "bf16-mixed" if fast else "32-true"


def _cpu_has_bfloat16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


def class_name(target: str) -> str:
    """``SGD`` of ``torch.optim.SGD``."""
    return target.rsplit(".", 1)[-1]


def loss_choice(choice: str, loss: Mapping[str, Any]) -> str:
    """The option of the loss group, for folders: ``rld``, or ``rld+at`` of a combination.

    Args:
        choice: ``hydra.runtime.choices.loss``.
        loss: the loss's part of the configuration.
    """
    return loss_name(loss) if _is_combined(loss) else choice


def loss_name(loss: Mapping[str, Any]) -> str:
    """What a run is called after its loss: ``RLD``, or ``rld+at`` of a combination.

    Args:
        loss: the loss's part of the configuration.
    """
    if _is_combined(loss):
        return "+".join(name for name, part in loss.items() if isinstance(part, Mapping) and "_target_" in part)
    return class_name(loss["_target_"]).removesuffix("Loss")


def _is_combined(loss: Mapping[str, Any]) -> bool:
    return class_name(loss["_target_"]) == "CombinedLoss"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values by their full keys, as text: ``{"loss.alpha": "1.0", ...}``.

    Args:
        values: a resolved configuration.
        prefix: what to put in front of each key.
    """
    pairs = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        pairs |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": str(value)}
    return pairs


# Cached, because a run has one folder and one precision.
OmegaConf.register_new_resolver("unique_name", unique_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("devices_per_node", devices_per_node, replace=True)
OmegaConf.register_new_resolver("nodes", nodes, replace=True)
OmegaConf.register_new_resolver("fast_precision", fast_precision, use_cache=True, replace=True)
OmegaConf.register_new_resolver("loss_choice", loss_choice, replace=True)
