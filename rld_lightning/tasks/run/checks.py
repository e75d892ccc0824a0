"""Checks before training or evaluation for errors that would occur later; each is one sentence."""

from collections.abc import Callable, Iterable
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rld_lightning.data.base import ImageDataModule
from rld_lightning.data.sampler import share_of_batch
from rld_lightning.errors import first_line
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.models.factory import blueprint, create_model
from rld_lightning.models.libraries import published_input
from rld_lightning.models.registry import member_names
from rld_lightning.models.taps import evaluation_mode
from rld_lightning.models.teacher.torchscript_and_onnx import FOREIGN
from rld_lightning.models.weights.facts import facts_of
from rld_lightning.models.weights.read import Weights
from rld_lightning.runs.checkpoint import RunRecord
from rld_lightning.schedule import make_schedule
from rld_lightning.tasks.run.plan import Plan, Student, Teacher
from rld_lightning.tasks.run.resume import check_folder, check_resume

LIBRARIES = ("torchvision/", "timm/", "transformers/")  # they provide weights


def check_start(plan: Plan, cfg: DictConfig) -> RunRecord | None:
    """Checks that a run can start or resume in its directory, and that its networks are known.

    Returns:
        what the checkpoint from which it resumes records about its run, if anything.

    Raises:
        FileNotFoundError: the checkpoint to resume from does not exist.
        ValueError: the directory contains another run, the checkpoint is another run's, a network's name is unknown, or
            the processes cannot share the batch.
    """
    if plan.processes > 1 and plan.batch_size is not None:
        share_of_batch(plan.batch_size, plan.processes)
    check_folder(plan.run, plan.resume, cfg.resume)
    before = check_resume(Path(plan.resume), plan.student.name, cfg) if plan.resume is not None else None
    check_names(plan.student, plan.teacher)
    return before


def check_names(student: Student, teacher: Teacher | None) -> None:
    """Checks the networks' names, and that the requested weights exist for them.

    Raises:
        ValueError: a name is unknown, or it cannot have the requested weights.
    """
    for role, network in (("teacher", teacher), ("student", student)):
        if network is None:
            continue
        if network.name is None:
            raise ValueError(f"model.{role}.name has no value; name a model, such as model.{role}.name=resnet20.")
        start = None  # an experiment's start does not matter if the teacher exists
        if isinstance(network, Teacher) and network.weights in ("auto", "fit"):
            start = network.start
        option = "weights" if start is None else "start"
        if "pretrained" in (network.weights, start) and not network.name.startswith(LIBRARIES):
            ways = "a file, published or fit" if (role, option) == ("teacher", "weights") else "a file, or null"
            own = ", where what it builds has weights already" if ":" in network.name else ""
            raise ValueError(
                f"model.{role}.{option}=pretrained is for torchvision/, timm/ and transformers/ names, not for "
                f"{network.name}; give {ways}{own}."
            )
        # Report a wrong name before a download.
        files = len(network.weights) if isinstance(network.weights, tuple) else 1
        for name in member_names(network.name, files):
            if name not in FOREIGN:
                _check_builds(name)


@cache
def _check_builds(name: str) -> None:
    """Builds a network without its weights, once per process: most trials of a sweep name the same ones."""
    blueprint(name)


def check_loss(loss: DistillationLoss, teacher: Teacher | None, label: str) -> None:
    """Checks that a loss has the teacher that it needs.

    Raises:
        ValueError: it needs one, and there is none.
    """
    if loss.needs_teacher and teacher is None:
        raise ValueError(
            f"the loss needs a teacher and model={label} has none; choose a pair "
            "(model=wrn40_2_to_wrn16_2, or model=pair with model.teacher.name and model.student.name), or loss=ce."
        )


def check_mixtures(loss: DistillationLoss, data: ImageDataModule) -> None:
    """Checks that a loss supports mixed images, if the data mix them.

    Raises:
        ValueError: the data mix images, and the loss does not support it.
    """
    if data.mix and not loss.takes_mixtures:
        raise ValueError(
            f"{type(loss).__name__} cannot learn from mixtures of images (data.mixup={data.mix.mixup}, "
            f"data.cutmix={data.mix.cutmix}): it remembers each image, or aligns gradients of one label; set both to "
            "0, or choose another loss."
        )


def check_recipe(
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer], scheduler: Callable[[Optimizer], LRScheduler] | None
) -> None:
    """Creates a run's optimizer and scheduler once for a dummy parameter, as training starts much later.

    Raises:
        ValueError: one of them cannot be created.
    """
    what = "optimizer"
    try:
        made = optimizer([nn.Parameter(torch.zeros(1))])
        what = "scheduler"
        if scheduler is not None:
            make_schedule(scheduler, made, lambda: 1000)
    except Exception as error:  # each class has its own exceptions for bad options
        raise ValueError(f"recipe.{what} cannot be made of its options: {error}") from error


def check_trainer(trainer: Trainer, settings: DictConfig, data: ImageDataModule) -> None:
    """Checks that a trainer supports the run.

    Raises:
        ValueError: it never trains or validates, cannot divide the batch, or lacks GPUs that an option needs.
    """
    if trainer.limit_val_batches == 0:
        raise ValueError(
            "trainer.limit_val_batches=0 leaves no accuracy to report; to validate less often, set "
            "trainer.check_val_every_n_epoch."
        )
    share_of_batch(data.batch_size, trainer.world_size)
    for split, sampler in (("train", data.train_sampler()), ("val", data.eval_sampler(data.val_size))):
        option = "overfit_batches" if settings.get("overfit_batches") else f"limit_{split}_batches"
        limit, number = getattr(trainer, f"limit_{split}_batches"), len(sampler)
        if _limited(number, limit) < 1:
            raise ValueError(
                f"trainer.{option}={limit} is none of the {number} {split} batches; take a number of them, such as "
                f"trainer.{option}=1, or a share of {ceil(1000 / number) / 1000:g} or more."
            )
    batches, every = _limited(len(data.train_sampler()), trainer.limit_train_batches), trainer.val_check_interval
    if isinstance(every, int) and every > batches and trainer.check_val_every_n_epoch is not None:
        raise ValueError(
            f"trainer.val_check_interval={every} is more than the {batches} train batches of an epoch; take fewer, a "
            "share of them such as 0.5, or trainer.check_val_every_n_epoch=null to count on over epochs."
        )
    if settings.get("sync_batchnorm") and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
        raise ValueError("trainer.sync_batchnorm=true needs GPUs: PyTorch's SyncBatchNorm does not run on a CPU.")


def _limited(batches: int, limit: float) -> int:
    """Returns how many batches an epoch has with a limit of the trainer: a number, or a share if it is a float."""
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)


def check_network(
    name: str,
    data: ImageDataModule,
    network: nn.Module | None = None,
    *,
    other_sizes: bool = False,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> None:
    """Checks that a network maps two images of the data to logits.

    Args:
        network: the network, on the CPU; by default a new one of this name.
        other_sizes: whether the data accept another ``data.image_size``.
        num_classes: its number of classes; by default the data's.
        image_size: height and width of its input; by default the data's.

    Raises:
        ValueError: it does not accept the images, or its output is not logits ``(2, C)``.
    """
    num_classes = data.num_classes if num_classes is None else num_classes
    own = "" if network is not None or other_sizes else _at_its_size(name)
    network = create_model(name, num_classes) if network is None else network
    image_shape = data.image_shape if image_size is None else (3, *image_size)
    shape = "x".join(map(str, image_shape))
    try:
        with evaluation_mode(network), torch.no_grad():
            logits = network(torch.zeros(2, *image_shape))
    except Exception as error:  # each library has its own exceptions for bad images
        size = "another size with data.image_size=, or " if other_sizes else own
        raise ValueError(
            f"{name} cannot take images of {shape} ({first_line(error)}); choose {size}another model."
        ) from error
    found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if found != (2, num_classes):
        raise ValueError(
            f"{name} makes {found} of two images of {shape}, not logits {(2, num_classes)}; choose another model."
        )


def _at_its_size(name: str) -> str:
    """Suggests a solution for a network that its library publishes for another image size."""
    published = published_input(name) if name.startswith(("torchvision/", "timm/")) and "@" not in name else None
    return "" if published is None else f"{name}@{published[2]}, which resizes them itself, or "


def split_to_measure(settings: DictConfig, weights: Weights) -> dict[str, Any]:
    """Returns what a weights file's run held out, for the options that the data's configuration leaves open (null).

    Returns:
        values by option, such as ``{"seed": 0, "val_fraction": 0.1}``; 0 if the file does not record it.

    Raises:
        WeightsError: the file's value is not a number in range.
    """
    facts = facts_of(weights)
    options = {option: getattr(facts, name) or 0 for name, option in ImageDataModule.split_options.items()}
    return {option: value for option, value in options.items() if settings[option] is None}


def check_split(weights: Weights, data: ImageDataModule, split: str) -> None:
    """Refuses to evaluate weights on images of their training, as far as their file records what was held out.

    Raises:
        ValueError: other images were held out during their training.
    """
    facts = facts_of(weights)
    if facts.dataset != data.name:
        return
    # The split of the training images does not affect the test split; if nothing is held out, the seed does not matter.
    harmless = ImageDataModule.split_options if split == "test" else () if data.val_fraction else ("data_seed",)
    for name, value in data.split_facts.items():
        known, option = getattr(facts, name), f"data.{data.split_options[name]}"
        if name not in harmless and known not in (None, value):
            raise ValueError(
                f"{weights.source} was trained with {option}={known}, and with {option}={value} it would be measured "
                f"on images that it was trained on; add {option}={known}."
            )
