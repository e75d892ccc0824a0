"""Builds the parts of a run that depend on more than their section of the configuration."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rld_lightning.callbacks import CheckpointFiles, ExactResume, OwnSettings, SameConfiguration, StopSignals
from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.losses.connect import connect
from rld_lightning.models.factory import create_model
from rld_lightning.models.input_size import split_size
from rld_lightning.models.normalisation import Normalisation, published_normalisation, stored_normalisation
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.weights.companion_files import find_weights
from rld_lightning.models.weights.facts import facts_of
from rld_lightning.models.weights.verify import load_weights
from rld_lightning.module import DistillationModule
from rld_lightning.tasks.run.fold_and_compile import fold_teacher
from rld_lightning.tasks.run.make import make_trainer
from rld_lightning.tasks.run.matched_classes import reorder_to_data
from rld_lightning.tasks.run.plan import Plan, Student, completed_config, with_values
from rld_lightning.trainer_callbacks import log_in_place, skip_idle_hooks, skip_idle_profiler


def set_up(data: ImageDataModule, *, strong_view: bool) -> None:
    """Downloads data if needed, sets them up, and prints their line."""
    data.prepare_data()
    data.setup("fit")
    print_line("data", data.describe())
    data.strong_view = strong_view


def build_student(planned: Student, data: ImageDataModule) -> nn.Module:
    """Builds the student with the weights that it starts from.

    Raises:
        WeightsError: the file of its weights cannot be used, or is another network's.
        ValueError: its weights know other classes.
    """
    name, weights = planned.name, planned.weights
    pretrained = {"pretrained": True} if weights == "pretrained" else {}
    student = create_model(name, data.num_classes, **pretrained)
    if weights not in (None, "pretrained"):
        reorder_to_data(student, name, load_weights(student, weights, name=name), data, "student")
    return student


def build_module(
    plan: Plan,
    data: ImageDataModule,
    loss: DistillationLoss,
    teacher: FrozenTeacher | None,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    scheduler: Callable[[Optimizer], LRScheduler] | None,
) -> DistillationModule:
    """Builds the student and its training module; without a teacher if the loss needs none."""
    # Earlier steps may have used random numbers; the student depends only on the seed, with or without a teacher.
    seed_everything(plan.seed, workers=True, verbose=False)
    name, student = plan.student.name, build_student(plan.student, data)
    if teacher is not None:
        plain, student = student, connect(loss, student, teacher.model, data.image_shape, data.train_label)
        if student is not plain and plan.teacher is not None:
            name = f"{name}@{plan.teacher.name}"
        if plan.teacher is not None and plan.teacher.options["fuse"] == "auto":
            fold_teacher(teacher, loss, data)
    layout = torch.channels_last if plan.student.channels_last else torch.preserve_format
    return DistillationModule(
        student.to(memory_format=layout),
        loss.to(memory_format=layout),
        optimizer,
        scheduler,
        teacher=teacher,
        num_classes=data.num_classes,
        scheduler_interval=plan.scheduler_interval,
        scheduler_monitor=plan.scheduler_monitor,
        capture=plan.capture,
        info={
            "student": name,
            "dataset": data.name,
            "mean": list(data.mean),
            "std": list(data.std),
            **data.split_facts,
        },
    )


def loggers_and_callbacks(cfg: DictConfig) -> dict[str, Any]:
    """Returns the run's loggers and callbacks, as arguments of the trainer."""
    callbacks: list[Callback] = [instantiate(callback) for callback in cfg.callbacks.values() if callback]
    enabled = {}
    for option, kind in (("enable_progress_bar", ProgressBar), ("enable_checkpointing", Checkpoint)):
        if cfg.trainer.get(option) is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, kind)]
        # Lightning would add its own in place of those that callbacks.<name>=null has switched off.
        enabled[option] = any(isinstance(callback, kind) for callback in callbacks)
    return {
        "logger": [instantiate(logger) for logger in cfg.logger.values() if logger],
        "callbacks": [*callbacks, ExactResume()],
        **enabled,
    }


def build_trainer(cfg: DictConfig) -> Trainer:
    """Builds the trainer with the loggers and callbacks; it writes checkpoints atomically and verifies them."""
    trainer = make_trainer(cfg.trainer, **loggers_and_callbacks(cfg))
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # none set by trainer.plugins
        trainer.strategy.checkpoint_io = CheckpointFiles()
    return trainer


def add_run_callbacks(trainer: Trainer, cfg: DictConfig, plan: Plan) -> None:
    """Adds the callbacks of every run, whatever its configuration, once its teacher has been found."""
    teacher = {} if plan.teacher is None else {"model.teacher.sha256": plan.teacher.sha256}
    shared = with_values(cfg, teacher)  # paths may differ between machines, the files' content may not
    callbacks: list[Callback] = vars(trainer)["callbacks"]  # not declared by Lightning
    callbacks += [SameConfiguration(shared), OwnSettings(completed_config(cfg, plan)), StopSignals()]
    skip_idle_hooks(trainer)
    skip_idle_profiler(trainer)
    log_in_place(trainer)


def adopt_normalisation(student: Student, data: ImageDataModule, settings: Mapping[str, Any]) -> Normalisation:
    """Sets the data's normalisation to that of the weights from which the student starts, if any.

    The data are changed, not the student's input, so that all files of the run record what it was trained on.

    Args:
        settings: the data's; a normalisation set there is kept, with a warning.

    Returns:
        the data's previous normalisation.
    """
    usual = Normalisation(tuple(data.mean), tuple(data.std))
    if (side := split_size(student.name)[1]) is not None:
        print_line("student", "sees images resized to {0}x{0} from {1}x{2}".format(side, *data.image_shape[1:]))
    if student.weights == "pretrained":
        wanted = published_normalisation(student.name)
    elif student.weights is not None:
        wanted = stored_normalisation(facts_of(find_weights(student.weights)))
    else:
        wanted = None
    if wanted in (None, usual):
        return usual
    if settings.get("mean") is not None or settings.get("std") is not None:
        print_line("caution", f"{student.name} was trained with {wanted}; data.mean and data.std say otherwise")
    else:
        data.normalize_with(*wanted)
        print_line("student", f"images are normalised with {wanted}, which its weights were trained with")
    return usual
