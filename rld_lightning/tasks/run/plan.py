"""What a run is to do, read from its configuration once, with what was found. Nothing writes into a configuration."""

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from rld_lightning.models.classes import read_class_map
from rld_lightning.models.normalisation import Look, look_of
from rld_lightning.models.teacher.teacher_store import TeacherStore
from rld_lightning.runs.checkpoint import RunRecord
from rld_lightning.runs.files import SPLIT
from rld_lightning.tasks.run.batch_size import AUTO


@dataclass(frozen=True)
class Student:
    """The network to train: ``model.student``.

    Attributes:
        name: for :func:`~rld_lightning.models.create_model`.
        weights: a file to start from, or ``"pretrained"``; None for random ones.
        channels_last: whether it computes in that layout.
    """

    name: str
    weights: str | None
    channels_last: bool


@dataclass(frozen=True)
class Teacher:
    """The network to learn from: ``model.teacher``."""

    name: str  # for `create_model`; of unlike networks all, as `names_of_members` reads them
    # A file, several for an ensemble, or `"pretrained"`; or where to look for a file, `"auto"`, `"fit"` or
    # `"published"`
    weights: str | tuple[str, ...] | None
    published_url: str  # the archive of published teachers
    # What it wants images normalised with, as `mean` and `std` say; None where they leave it to its file
    look: Look | None
    options: Mapping[str, Any]  # of `FrozenTeacher`; `fuse` may also be `"auto"`
    sha256: str | None = None  # of the file; None where it is not known yet, and of what is no file
    start: str | None = None  # what one that has to be trained begins from, as `weights` of a student
    mean_of: str = "logits"  # what an ensemble takes the mean of, see `Ensemble`
    class_map: Mapping[str, str | int] | None = None  # which of its classes those of the data are, see `places_of`
    # The side of the images that it wants; `"auto"`: what it was trained with; None: the data's
    image_size: int | str | None = "auto"
    # Whether its logits are kept in a table and looked up; `"auto"`: where that pays; `"fill"`: and all are computed
    # before the training
    cache: bool | str = False
    cache_dtype: str = "float16"  # what they are kept in


@dataclass(frozen=True)
class Plan:
    """What a run is to do."""

    run: Path  # the run's folder
    resume: str | None  # the checkpoint that it goes on from; None where it begins
    processes: int  # how many are to be started; 1 where this process trains
    seed: int  # of weights, order and augmentation
    label: str  # what the pair, or the single network, is called
    student: Student  # the network to train
    teacher: Teacher | None  # the network to learn from; None without one, and where the loss needs none
    store: TeacherStore  # where trained teachers are kept
    compile: bool | str  # whether training steps are compiled; `"auto"`: where that pays
    capture: bool | str  # whether a step is launched as one CUDA graph; `"auto"`: on a GPU
    loss: str  # what the loss is called
    batch_size: int | None  # over all processes; None until one has been chosen that suits the device and the data
    other_sizes: bool  # whether the data can have another `data.image_size`
    optimizer: str  # its class
    recipe_rate: float  # the recipe's learning rate
    scale_lr_from: int | None  # the batch size that it is for; None where it holds for any
    scheduler_interval: str  # when the schedule steps
    scheduler_monitor: str | None  # what a schedule looks at that waits for a plateau; None for the usual
    # What the checkpoint that it goes on from says about its run; None where it says nothing
    before: RunRecord | None = None

    @property
    def learning_rate(self) -> float:
        """The rate to train with, by linear scaling (Goyal et al., arXiv 1706.02677) where the recipe asks for it.

        Raises:
            ValueError: the batch size to scale from is not positive.
        """
        if self.scale_lr_from is None:
            return self.recipe_rate
        if self.scale_lr_from < 1:
            raise ValueError(
                f"recipe.scale_lr_from={self.scale_lr_from} must be a batch size, such as 256, or null for no scaling."
            )
        assert self.batch_size is not None  # rates are asked for once it is known
        return self.recipe_rate * self.batch_size / self.scale_lr_from


def plan_student(settings: DictConfig) -> Student:
    """The network to train, as ``model.student`` says."""
    return Student(settings.name, settings.weights, settings.channels_last)


def plan_teacher(settings: DictConfig | None) -> Teacher | None:
    """The network to learn from, as ``model.teacher`` says; None without one.

    Raises:
        ValueError: ``mean`` and ``std`` are not three numbers each, or ``cache`` is another word.
    """
    if settings is None:
        return None
    look = look_of(settings.get("mean"), settings.get("std"))
    options = {option: settings[option] for option in ("dtype", "channels_last", "fuse", "shard", "batch_statistics")}
    if settings.cache not in (True, False, "auto", "fill"):
        raise ValueError(f"model.teacher.cache={settings.cache} is unknown; choose true, false, auto or fill.")
    weights, class_map = settings.weights, settings.get("class_map")
    if isinstance(class_map, str):
        class_map = read_class_map(Path(class_map).expanduser())
    elif class_map is not None:
        class_map = {str(name): target for name, target in class_map.items()}
    return Teacher(
        settings.name,
        tuple(weights) if isinstance(weights, ListConfig) else weights,
        settings.published_url,
        look,
        options,
        sha256=settings.sha256,
        start=settings.get("start"),
        mean_of=settings.get("mean_of", "logits"),
        class_map=class_map,
        image_size=settings.get("image_size", "auto"),
        cache=settings.cache,
        cache_dtype=settings.cache_dtype,
    )


def freeze(cfg: DictConfig) -> None:
    """Lets nobody write into a configuration any more."""
    OmegaConf.set_readonly(cfg, True)


def changed(cfg: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """Another configuration, frozen, with other values by full key.

    Args:
        values: such as ``{"recipe.optimizer.lr": 0.1}``.
    """
    other = deepcopy(cfg)
    OmegaConf.set_readonly(other, False)
    for key, value in values.items():
        OmegaConf.update(other, key, value, force_add=True)
    freeze(other)
    return other


def alone(cfg: DictConfig, name: str, weights: str | None, folder: Path) -> DictConfig:
    """The configuration of a run that trains one network by itself: with cross-entropy, and a run's data and recipe.

    Args:
        weights: what it starts from, as ``model.student.weights``.
    """
    own = deepcopy(cfg)
    OmegaConf.set_readonly(own, False)
    OmegaConf.set_struct(own, False)
    if "split_file" in own.data and (written := Path(cfg.paths.run) / SPLIT).is_file():
        own.data.split_file = str(written)  # the images of a folder are shared out as those of the run
    own.dataset, own.recipe_name = cfg.dataset, cfg.recipe_name  # which Hydra knows
    own.pop("hydra", None)
    student = {**cfg.model.student, "name": name, "weights": weights}
    own.model = OmegaConf.merge(cfg.model, {"label": name, "teacher": None, "student": student, "tuned": None})
    own.loss = {"_target_": "rld_lightning.losses.CELoss"}
    own.method = "ce"
    own.print_config = False
    own.paths.run = str(folder)
    own.resume = None
    own.after = []
    own.callbacks.pop("pruner", None)  # which would take it for a trial
    if "WANDB_RUN_ID" in os.environ:  # a sweep agent's, for the run that this one is for
        own.logger.pop("wandb", None)
    freeze(own)
    return own


def settled(cfg: DictConfig, plan: Plan) -> DictConfig:
    """A configuration with what was found for its run, for those who read it later: ``config.yaml`` and the loggers."""
    found: dict[str, Any] = {"resume": plan.resume}
    if plan.batch_size is not None:  # where it was to be chosen; a recipe's need not be that of the data
        keys = ("data.batch_size", "recipe.batch_size")
        found |= {key: plan.batch_size for key in keys if OmegaConf.select(cfg, key) == AUTO}
    if plan.teacher is not None:
        weights = plan.teacher.weights
        found["model.teacher.weights"] = list(weights) if isinstance(weights, tuple) else weights
        found["model.teacher.sha256"] = plan.teacher.sha256
    return changed(cfg, found)
