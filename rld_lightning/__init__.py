"""Refined Logit Distillation and the methods it is compared to, on PyTorch Lightning and Hydra."""

from rld_lightning.losses import (
    CELoss,
    DistillationLoss,
    DKDLoss,
    KDLoss,
    ModelOutput,
    RLDLoss,
    StepContext,
    dkd_loss,
    kd_loss,
    rld_loss,
)
from rld_lightning.models import create_model, list_models
from rld_lightning.models.teacher import FrozenTeacher
from rld_lightning.module import DistillationModule

__version__ = "0.1.0"

__all__ = [
    "CELoss",
    "DKDLoss",
    "DistillationLoss",
    "DistillationModule",
    "FrozenTeacher",
    "KDLoss",
    "ModelOutput",
    "RLDLoss",
    "StepContext",
    "create_model",
    "dkd_loss",
    "kd_loss",
    "list_models",
    "rld_loss",
]
