"""Checks that this machine has what a configuration requires: GPUs, SLURM, valid W&B variables."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig

from rld_lightning.errors import UserError, did_you_mean
from rld_lightning.hydra.checks.schema import WANDB_ENTITY, WANDB_PROJECT

_WANDB_MODES = ("online", "offline", "disabled", "shared", "run", "dryrun")


def check_machine(cfg: DictConfig) -> None:
    """Checks that this machine has what a configuration requires.

    Args:
        cfg: the checked configuration of any script; includes Hydra's node at the start of a sweep.

    Raises:
        UserError: one sentence per missing requirement.
    """
    faults = [*_gpus(cfg.get("trainer") or {}), *_wandb(cfg), *_cluster(cfg)]
    if faults:
        raise UserError("\n".join(faults))


def _gpus(trainer: Any) -> Iterator[str]:
    wanted = trainer.get("accelerator")
    if wanted not in ("gpu", "cuda", "mps"):
        return
    import torch  # slow, but the run needs it as well

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if not {"gpu": cuda or mps, "cuda": cuda, "mps": mps}[wanted]:
        yield (
            f"trainer.accelerator={wanted} needs a GPU, and PyTorch {torch.__version__} finds none here; choose "
            "trainer=cpu, or trainer=auto for any available device."
        )
    elif cuda and isinstance(devices := trainer.get("devices"), int) and devices > torch.cuda.device_count():
        yield (f"trainer.devices={devices} exceeds the number of GPUs here, {torch.cuda.device_count()}; choose fewer.")


def _wandb(cfg: DictConfig) -> Iterator[str]:
    if not (cfg.get("logger") or {}).get("wandb"):
        return
    mode = os.environ.get("WANDB_MODE")
    if mode and mode not in _WANDB_MODES:
        meant = did_you_mean(mode, _WANDB_MODES)
        yield f"WANDB_MODE={mode} is not a mode of W&B; choose online, offline or disabled.{meant}"
    for name, kind in (("WANDB_PROJECT", WANDB_PROJECT), ("WANDB_ENTITY", WANDB_ENTITY)):  # they override the options
        if (value := os.environ.get(name)) and not kind.allows(value):
            yield f"{name}={value} in the environment is not allowed; it must be {kind.must_be}."


def _cluster(cfg: DictConfig) -> Iterator[str]:
    launcher = str(((cfg.get("hydra") or {}).get("launcher") or {}).get("_target_", ""))
    if launcher.endswith("SlurmLauncher") and shutil.which("srun") is None:
        yield (
            "launcher=submitit_slurm submits trials to SLURM, but this machine has no srun; start the sweep on "
            "the cluster, or choose launcher=joblib, or none."
        )
