"""Distillation losses: for each method a pure function of tensors and a module that holds its hyper-parameters."""

from rld_lightning.losses.base import DistillationLoss, ModelOutput, StepContext
from rld_lightning.losses.ce import CELoss
from rld_lightning.losses.dkd import DKDLoss, dkd_loss
from rld_lightning.losses.kd import KDLoss, kd_loss
from rld_lightning.losses.rld import RLDLoss, rld_loss

__all__ = [
    "CELoss",
    "DKDLoss",
    "DistillationLoss",
    "KDLoss",
    "ModelOutput",
    "RLDLoss",
    "StepContext",
    "dkd_loss",
    "kd_loss",
    "rld_loss",
]
