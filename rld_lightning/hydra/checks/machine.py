"""Checks that this machine has what a configuration requires: GPUs, SLURM, valid W&B variables."""

import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

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
    faults = [*_gpus(cfg), *_wandb(cfg), *_cluster(cfg)]
    if faults:
        raise UserError("\n".join(faults))


def _gpus(cfg: DictConfig) -> Iterator[str]:
    trainer = cfg.get("trainer") or {}
    wanted = trainer.get("accelerator")
    if wanted not in ("gpu", "cuda", "mps") and not (wanted == "auto" and sys.platform == "darwin"):
        return
    import torch  # slow, but the run needs it as well

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if not {"gpu": cuda or mps, "cuda": cuda, "mps": mps, "auto": True}[wanted]:
        yield (
            f"trainer.accelerator={wanted} needs a GPU, and PyTorch {torch.__version__} finds none here; choose "
            "trainer=cpu, or trainer=auto for any available device."
        )
    elif cuda and isinstance(devices := trainer.get("devices"), int) and devices > torch.cuda.device_count():
        yield (f"trainer.devices={devices} exceeds the number of GPUs here, {torch.cuda.device_count()}; choose fewer.")
    elif mps and not cuda:
        yield from _apple_gpu(cfg, trainer)


def _apple_gpu(cfg: DictConfig, trainer: Any) -> Iterator[str]:
    """Refuses what Apple's GPUs cannot do: work in several processes, and compute in float64."""
    strategy, devices = str(trainer.get("strategy")), trainer.get("devices")
    if any(name in strategy for name in ("ddp", "fsdp")) or (isinstance(devices, int) and devices > 1):
        yield (
            f"trainer.strategy={strategy} trainer.devices={devices} needs several GPUs, and a Mac has one; choose "
            "trainer=auto, or trainer=ddp_cpu for processes on the CPU."
        )
    for option in ("trainer.precision", "model.teacher.dtype"):
        if "64" in str(value := OmegaConf.select(cfg, option)):
            yield f"{option}={value} needs float64, which Apple's GPUs do not have; add trainer=cpu."


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
