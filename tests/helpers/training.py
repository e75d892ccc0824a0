"""Small trainings on the digits, which print nothing and leave nothing that they are not asked for."""

from functools import partial

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from rld_lightning import CELoss, DistillationModule


def linear(seed=0):
    """A network for images of 8x8 pixels in ten classes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


def job(student=None, loss=None, *, lr=0.1, momentum=0.0, **options):
    """What is trained: the linear network with cross-entropy, where nothing else is said."""
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=momentum)
    return DistillationModule(student or linear(), loss or CELoss(), optimizer, num_classes=10, **options)


def quiet_trainer(*callbacks, **options):
    """A trainer on the CPU; it saves where one of the callbacks does."""
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    usual = {"accelerator": "cpu", "logger": False, "enable_checkpointing": saves, "num_sanity_val_steps": 0}
    usual |= {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(callbacks=list(callbacks), **usual | options)
