"""Accuracy of student and teacher per class, and the student's confusion matrix."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rld_lightning.module import DistillationModule
from rld_lightning.runs.files import CLASSES, CONFUSION, write_csv

_SECONDS = 10.0  # minimum time between two writes


class ClassAccuracy(Callback):
    """Writes ``classes.csv`` for the last validation: one row per class, in the order of the labels.

    It is written after each validation, or if epochs are short every few seconds, and when the run ends or stops.

    Columns: ``class``, ``images``, the student's ``accuracy`` and, if
    :class:`~rld_lightning.callbacks.TeacherMonitor` runs before this callback, ``teacher_accuracy``, in percent; empty
    for a class without images. ``confusion.csv`` has the student's confusions: one row for each ``class`` and
    ``predicted`` class with at least one image (``images``).

    Args:
        dirpath: the directory to write to.
    """

    def __init__(self, dirpath: str | Path) -> None:
        self.path = Path(dirpath) / CLASSES
        self.counts: Tensor | None = None
        self._has_teacher = False
        self._finished: Tensor | None = None  # counts not written yet
        self._written = float("-inf")  # time of the last write

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Resets the counts."""
        classes = pl_module.hparams["num_classes"]
        # (C, C + 1): the student's confusion matrix, and how many images of the class the teacher has right.
        self.counts = torch.zeros(classes, classes + 1, dtype=torch.long, device=trainer.strategy.root_device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: DistillationModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts a batch."""
        label, teacher = outputs["label"], outputs.get("teacher_prediction")
        predicted = outputs["student_logits"].argmax(1)
        assert self.counts is not None  # created when the validation started
        # Not bincount, which synchronises with the device.
        flat, row = self.counts.view(-1), label * self.counts.shape[1]
        flat.scatter_add_(0, row + predicted, torch.ones_like(label))
        if teacher is not None:
            self._has_teacher = True
            flat.scatter_add_(0, row + len(self.counts), (teacher == label).long())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Sums over the ranks, and writes on rank 0 if it is time."""
        counts = trainer.strategy.reduce(self.counts, reduce_op="sum")
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._finished = counts
        if trainer.state.fn != TrainerFn.FITTING or time.monotonic() - self._written > _SECONDS:
            self._write(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the files."""
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the files."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self._finished is None:
            return
        counts, self._finished = self._finished.cpu(), None
        self._written = time.monotonic()
        confusion, teacher_right = counts[:, :-1], counts[:, -1]
        images = confusion.sum(1)
        data = trainer.datamodule  # type: ignore[attr-defined]
        names = getattr(data, "class_names", None) or range(len(images))
        table = {"class": names, "images": images.tolist(), "accuracy": _percent(confusion.diagonal(), images)}
        if self._has_teacher:
            table["teacher_accuracy"] = _percent(teacher_right, images)
        write_csv(self.path, table)
        labels, predicted = (index.tolist() for index in confusion.nonzero(as_tuple=True))
        found = {"class": [names[k] for k in labels], "predicted": [names[k] for k in predicted]}
        write_csv(self.path.with_name(CONFUSION), found | {"images": confusion[confusion > 0].tolist()})


def _percent(right: Tensor, images: Tensor) -> list[str]:
    """Formats percentages with four decimals; empty for classes without images."""
    return [f"{100 * a / b:.4f}" if b else "" for a, b in zip(right.tolist(), images.tolist(), strict=True)]
