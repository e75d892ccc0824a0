"""Refined Logit Distillation and the methods it is compared to, on PyTorch Lightning and Hydra."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rld_lightning.package_files import __version__ as __version__

if TYPE_CHECKING:
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
    from rld_lightning.models.student import Student, load_student
    from rld_lightning.models.teacher import FrozenTeacher
    from rld_lightning.models.weights.verify import load_weights
    from rld_lightning.module import DistillationModule

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
    "Student",
    "create_model",
    "dkd_loss",
    "kd_loss",
    "list_models",
    "load_student",
    "load_weights",
    "rld_loss",
]

# Imported on first use, so that a loss can be imported without Lightning and torchvision, and the command line's help
# and errors are shown without importing PyTorch.
_HOMES = {
    **dict.fromkeys(__all__, "rld_lightning.losses"),
    "DistillationModule": "rld_lightning.module",
    "FrozenTeacher": "rld_lightning.models.teacher",
    "Student": "rld_lightning.models.student",
    "load_student": "rld_lightning.models.student",
    "create_model": "rld_lightning.models",
    "list_models": "rld_lightning.models",
    "load_weights": "rld_lightning.models.weights.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
