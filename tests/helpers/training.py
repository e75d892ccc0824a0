"""Small trainings on the digits, without output or files by default."""

from functools import partial

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from rld_lightning import CELoss, DistillationModule


def linear(seed=0):
    """A linear network for images of 8x8 pixels in ten classes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


def job(student=None, loss=None, *, lr=0.1, momentum=0.0, **options):
    """The module to train; by default the linear network with cross-entropy."""
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=momentum)
    return DistillationModule(student or linear(), loss or CELoss(), optimizer, num_classes=10, **options)


def quiet_trainer(*callbacks, **options):
    """A silent trainer on the CPU; it saves checkpoints only through given callbacks."""
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    usual = {"accelerator": "cpu", "logger": False, "enable_checkpointing": saves, "num_sanity_val_steps": 0}
    usual |= {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(callbacks=list(callbacks), **usual | options)
