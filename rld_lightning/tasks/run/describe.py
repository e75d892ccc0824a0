"""Prints the description of a run before it trains."""

from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import nn

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.hydra.resolvers import choice
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.models.complexity import count_macs, count_parameters, is_mostly_depthwise
from rld_lightning.module import DistillationModule
from rld_lightning.runs.settings import changes
from rld_lightning.tasks.run.plan import Plan


def describe_run(
    cfg: DictConfig, plan: Plan, data: ImageDataModule, trainer: Trainer, module: DistillationModule
) -> None:
    """Prints one line for each part of the run that has not printed its own yet."""
    print_line("student", f"{module.hparams['student']}, {describe_size(module.student, data.image_shape)}")
    print_line("loss", module.loss.describe())
    if data.mix:
        how = " ".join(f"data.{name}={a:g}" for name in ("mixup", "cutmix") if (a := getattr(data.mix, name)))
        print_line("mixed", f"{how}: of two images and labels each; train top-1 is of the label with the larger share")
    own, recipe = module.loss.own_recipe, choice("recipe", _root_=cfg)
    if own and recipe == "cifar240":
        print_line("recipe", f"{recipe}; the public code of {plan.loss} trains otherwise, as recipe={own} does")
    rate = f"{plan.learning_rate:g}"
    if plan.scale_lr_from is not None:
        rate += f" = {plan.recipe_rate:g} x {plan.batch_size} / {plan.scale_lr_from}"
    devices = trainer.world_size
    assert plan.batch_size is not None  # the plan is complete here
    epochs = "1 epoch" if trainer.max_epochs == 1 else f"{trainer.max_epochs} epochs"
    print_line(
        "training",
        f"{plan.optimizer}, learning rate {rate}, batch {plan.batch_size} = {devices} x {plan.batch_size // devices} "
        f"on {trainer.strategy.root_device.type}, precision {trainer.precision}, {epochs}",
    )
    if divided := describe_parts(module.loss, devices * trainer.accumulate_grad_batches, plan.batch_size // devices):
        print_line("training", f"{plan.loss} {divided}")
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if on_cpu and trainer.precision == "bf16-mixed" and is_mostly_depthwise(module.student):
        teacher = "" if module.teacher is None else " model.teacher.dtype=bfloat16"
        print_line(
            "training",
            "the student is mostly depthwise convolutions, whose gradients a CPU computes slower in bfloat16: "
            f"trainer.precision=32-true{teacher} may be faster",
        )
    if plan.resume is not None and plan.before is not None:
        others = changes(plan.before.settings, cfg)
        new = [f"{key}={now} instead of {before}" for key, (before, now) in others.items()]
        print_line("resume", ", ".join([plan.resume, *new]))
    watched = [str(getattr(callback, "monitor", "")) for callback in trainer.early_stopping_callbacks]
    if data.val_split == "test" and any(name.startswith("val/") for name in watched):
        print_line(
            "caution",
            "early stopping monitors the test split, which is then no longer a test; data.val_fraction=0.1 holds out "
            "some training images for it",
        )
    print_line("folder", str(plan.run))


def describe_parts(loss: DistillationLoss, parts: int, size: int) -> str:
    """Describes how a loss treats a divided batch, if its value differs from that of the whole batch; else empty.

    Args:
        parts: number of parts, from processes or accumulated gradients.
    """
    if parts == 1 or not loss.of_whole_batch:
        return ""
    return (
        f"depends on the whole batch, and here sees {size} images at a time: a step of {parts} such batches is not the "
        "same as one with all their images"
    )


def describe_size(model: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """Describes a model's parameters and multiply-accumulates, for the console."""
    parameters, macs = count_parameters(model), count_macs(model, image_shape)
    return f"{_millions(parameters, 2)} parameters, {_millions(macs, 1)} MACs"


def _millions(number: int, digits: int) -> str:
    """Formats a number in millions, or in full if these digits would show 0."""
    return f"{number / 1e6:.{digits}f} M" if number >= 10 ** (6 - digits) else f"{number:,}"
