"""A run's plan: read once from the configuration, then completed. Configurations are never modified."""

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from rld_lightning.hydra.registered_names import known
from rld_lightning.models.classes import read_class_map
from rld_lightning.models.normalisation import Normalisation, parse_normalisation
from rld_lightning.models.teacher.teacher_store import TeacherStore
from rld_lightning.runs.checkpoint import RunRecord
from rld_lightning.runs.files import SPLIT
from rld_lightning.tasks.run.make import AUTO


@dataclass(frozen=True)
class Student:
    """The network to train: ``model.student``.

    Attributes:
        name: for :func:`~rld_lightning.models.create_model`.
        weights: a file to start from, or ``"pretrained"``; None for random weights.
        channels_last: whether to use this memory layout.
    """

    name: str
    weights: str | None
    channels_last: bool


@dataclass(frozen=True)
class Teacher:
    """The network to learn from: ``model.teacher``."""

    name: str  # for `create_model`; for different networks all names, as `member_names` parses them
    # A file, several for an ensemble, or `"pretrained"`; or where to search for a file: `"auto"`, `"fit"` or
    # `"published"`
    weights: str | tuple[str, ...] | None
    published_url: str  # archive of published teachers
    # Normalisation of its input, from `mean` and `std`; None if its file determines it
    normalisation: Normalisation | None
    options: Mapping[str, Any]  # of `FrozenTeacher`; `fuse` may also be `"auto"`
    sha256: str | None = None  # of the file; None if not known yet, and without a file
    start: str | None = None  # initial weights if it has to be trained, like a student's `weights`
    mean_of: str = "logits"  # what an ensemble averages, see `Ensemble`
    class_map: Mapping[str, str | int] | None = None  # its classes for those of the data, see `class_positions`
    # Side of its input images; `"auto"`: as in its training; None: as the data
    image_size: int | str | None = "auto"
    # Whether its logits are cached in a table; `"auto"`: if that pays off; `"fill"`: all are computed before the
    # training
    cache: bool | str = False
    cache_dtype: str = "float16"  # data type of the table


@dataclass(frozen=True)
class Plan:
    """A run's plan."""

    run: Path  # the run directory
    resume: str | None  # the checkpoint from which it resumes; None for a new run
    processes: int  # number of processes to start; 1 if this process trains
    seed: int  # for weights, order and augmentation
    label: str  # name of the pair, or of the single network
    student: Student  # the network to train
    teacher: Teacher | None  # the network to learn from; None without one, and if the loss needs none
    store: TeacherStore  # the store of trained teachers
    compile: bool | str  # whether to compile training steps; `"auto"`: if that pays off
    capture: bool | str  # whether to run a step as one CUDA graph; `"auto"`: on a GPU
    loss: str  # name of the loss
    batch_size: int | None  # over all processes; None until it has been chosen for device and data
    other_sizes: bool  # whether the data accept another `data.image_size`
    optimizer: str  # its class
    recipe_rate: float  # the recipe's learning rate
    scale_lr_from: int | None  # the batch size for that rate; None if the rate is not scaled
    scheduler_interval: str  # when the scheduler steps
    scheduler_monitor: str | None  # metric for a plateau scheduler; None for the default
    # What the checkpoint from which it resumes records about its run; None without a record
    before: RunRecord | None = None

    @property
    def learning_rate(self) -> float:
        """The learning rate, with linear scaling (Goyal et al., arXiv 1706.02677) if the recipe requests it.

        Raises:
            ValueError: the batch size to scale from is not positive.
        """
        if self.scale_lr_from is None:
            return self.recipe_rate
        if self.scale_lr_from < 1:
            raise ValueError(
                f"recipe.scale_lr_from={self.scale_lr_from} must be a batch size, such as 256, or null for no scaling."
            )
        assert self.batch_size is not None  # chosen before rates are needed
        return self.recipe_rate * self.batch_size / self.scale_lr_from


def plan_student(settings: DictConfig) -> Student:
    """Reads the network to train from ``model.student``."""
    return Student(settings.name, settings.weights, settings.channels_last)


def plan_teacher(settings: DictConfig | None) -> Teacher | None:
    """Reads the network to learn from from ``model.teacher``; None without one.

    Raises:
        ValueError: ``mean`` and ``std`` are not three numbers each, ``cache`` is an unknown word, or the chosen model
            has no teacher to set values for.
    """
    if settings is None:
        return None
    if "cache" not in settings:  # an experiment or an added key has set some values of a model without a teacher
        raise ValueError(
            f"model.teacher has only {', '.join(settings)}, because the chosen model has no teacher; choose a pair "
            "(model=pair with model.teacher.name and model.student.name), or model.teacher=null for none."
        )
    normalisation = parse_normalisation(settings.get("mean"), settings.get("std"))
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
        normalisation,
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
    """Makes a configuration read-only."""
    OmegaConf.set_readonly(cfg, True)


def with_values(cfg: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """Returns a frozen copy of a configuration with other values, by full key.

    Args:
        values: such as ``{"recipe.optimizer.lr": 0.1}``.
    """
    other = deepcopy(cfg)
    OmegaConf.set_readonly(other, False)
    for key, value in values.items():
        OmegaConf.update(other, key, value, force_add=True)
    freeze(other)
    return other


def standalone_config(cfg: DictConfig, name: str, weights: str | None, folder: Path) -> DictConfig:
    """Returns the configuration of a run that trains one network alone: with cross-entropy and a run's data and recipe.

    Args:
        weights: initial weights, as ``model.student.weights``.
    """
    own = deepcopy(cfg)
    OmegaConf.set_readonly(own, False)
    OmegaConf.set_struct(own, False)
    if "split_file" in own.data and (written := Path(cfg.paths.run) / SPLIT).is_file():
        own.data.split_file = str(written)  # a folder's images are split as in the run
    own.dataset, own.recipe_name = cfg.dataset, cfg.recipe_name  # known from Hydra
    own.pop("hydra", None)
    student = {**cfg.model.student, "name": name, "weights": weights}
    own.model = OmegaConf.merge(cfg.model, {"label": name, "teacher": None, "student": student, "tuned": None})
    own.loss = dict(known().losses["ce"])  # with all its options, as loss=ce has
    own.method = "ce"
    own.print_config = False
    own.paths.run = str(folder)
    own.resume = None
    own.after = []
    own.callbacks.pop("pruner", None)  # it would take the run for a trial
    if "WANDB_RUN_ID" in os.environ:  # from a sweep agent, for the run for which this network is trained
        own.logger.pop("wandb", None)
    freeze(own)
    return own


def completed_config(cfg: DictConfig, plan: Plan) -> DictConfig:
    """Returns a configuration completed with a run's found values, for ``config.yaml`` and the loggers."""
    found: dict[str, Any] = {"resume": plan.resume}
    if plan.batch_size is not None:  # in case it was chosen; a recipe's batch size may differ from the data's
        keys = ("data.batch_size", "recipe.batch_size")
        found |= {key: plan.batch_size for key in keys if OmegaConf.select(cfg, key) == AUTO}
    if plan.teacher is not None:
        weights = plan.teacher.weights
        found["model.teacher.weights"] = list(weights) if isinstance(weights, tuple) else weights
        found["model.teacher.sha256"] = plan.teacher.sha256
    return with_values(cfg, found)
