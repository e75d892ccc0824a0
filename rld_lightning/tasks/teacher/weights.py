"""Finds, trains and stores the weights of a run's teacher."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.distributed import devices_per_node, rank_zero_only
from rld_lightning.errors import UserError
from rld_lightning.models.input_size import split_size
from rld_lightning.models.registry import canonical_name
from rld_lightning.models.teacher.teacher_store import SEARCHED, TeacherStore, resolve_teacher_weights
from rld_lightning.models.weights.read import split_part
from rld_lightning.runs.checkpoint import RunRecord
from rld_lightning.runs.files import STUDENT
from rld_lightning.runs.summary import Summary
from rld_lightning.tasks.run.plan import Teacher, standalone_config, with_values
from rld_lightning.tasks.run.resume import run_once


def find_teacher(
    teacher: Teacher, dataset: str, store: TeacherStore, record: RunRecord | None = None
) -> str | tuple[str, ...] | None:
    """Finds the weights of a run's teacher.

    Args:
        record: what the checkpoint from which the run resumes records about its run: it keeps its teacher.

    Returns:
        the file, or several, or ``"pretrained"``; None if the teacher has to be trained first.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the teacher does not exist, or cannot be sharded over a single process.
    """
    if teacher.options["shard"] and int(devices_per_node(1)) < 2:
        raise ValueError(
            "model.teacher.shard=true shares the teacher out over the processes of a machine, and there is one; take "
            "more devices (trainer=ddp trainer.devices=2), or model.teacher.shard=false."
        )
    if teacher.weights is None:
        raise ValueError("model.teacher.weights has no value; give a file, auto, fit, published or pretrained.")
    if teacher.weights == "pretrained":
        return "pretrained"
    if isinstance(teacher.weights, tuple):
        for file in teacher.weights:
            if not split_part(file)[0].is_file():
                raise FileNotFoundError(f"there is no teacher's weights file at {file}: an ensemble is one of files.")
        return teacher.weights
    looked_for = teacher.weights in SEARCHED
    if record is not None and looked_for and (before := _file_of(*record.teacher, teacher.name)) is not None:
        print_line("teacher", f"the one that the run had before: {before}")
        return before
    path = None
    if teacher.weights != "fit" or teacher.start is None:  # a teacher with initial weights is the run's own
        path = resolve_teacher_weights(
            teacher.weights, name=teacher.name, dataset=dataset, store=store, url=teacher.published_url
        )
    if path is None and record is not None and record.teacher_sha256 is not None:
        raise ValueError(
            f"the teacher of the run, {record.teacher[1]}, is gone or damaged: bring it back, or name its file with "
            "model.teacher.weights=."
        )
    if path is None and isinstance(teacher.image_size, int):
        raise ValueError(
            f"model.teacher.image_size={teacher.image_size} applies to existing weights; a teacher that is trained "
            f"first has its size in its name: model.teacher.name={split_size(teacher.name)[0]}@{teacher.image_size}."
        )
    return str(path) if path is not None else None


def _file_of(name: str | None, weights: str | None, wanted: str) -> str | None:
    """Returns the file of a teacher, if it is the wanted one and exists."""
    if name is None or weights is None or canonical_name(name) != canonical_name(wanted):
        return None
    return weights if split_part(weights)[0].is_file() else None


def train_teacher(cfg: DictConfig, folder: Path, fit: Callable[[DictConfig], Summary]) -> Summary:
    """Trains the teacher of a run or of later runs, resumes its training, or finds it finished.

    Returns:
        its results; its weights are in its directory.

    Raises:
        UserError: the training failed.
    """
    name = cfg.model.teacher.name
    own = standalone_config(cfg, name, cfg.model.teacher.get("start"), folder)
    look = {f"data.{key}": found for key in ("mean", "std") if (found := cfg.model.teacher.get(key)) is not None}
    try:
        summary = run_once(with_values(own, look), fit, name="teacher")
    except UserError as error:
        raise UserError(f"the teacher {name} could not be trained in {folder}: {error}") from error
    gc.collect()  # reference cycles would keep its network, optimizer and data on the device
    return summary


def is_reusable(data: ImageDataModule, start: str | None) -> bool:
    """Whether other runs can use a teacher: trained on all training images, from random weights."""
    return data.val_fraction == 0 and data.subset == 1 and start is None


def store_teacher(
    summary: Summary, folder: Path, store: TeacherStore, data: ImageDataModule, name: str, start: str | None
) -> None:
    """Stores a teacher that was trained for a run or a sweep, if other runs can use it.

    It must have been trained to the end on all training images, and evaluated on all.
    """
    if is_reusable(data, start) and summary.steps is not None and summary.complete:
        rank_zero_only(store.add)(folder / STUDENT, data.name, name)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # the other ranks read what rank 0 has stored
