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
        self.confusion: Tensor | None = None
        self._finished: tuple[Tensor, Tensor] | None = None  # results not written yet
        self._written = float("-inf")  # time of the last write

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Resets the counts."""
        classes = pl_module.hparams["num_classes"]
        # (4, C): images, correct by the student, evaluated by the teacher, correct by the teacher.
        self.counts = torch.zeros(4, classes, dtype=torch.long, device=trainer.strategy.root_device)
        self.confusion = self.counts.new_zeros(classes * classes)

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
        right = [torch.ones_like(label), (predicted == label).long()]
        if teacher is not None:
            right += [torch.ones_like(label), (teacher == label).long()]
        assert self.counts is not None  # created when the validation started
        assert self.confusion is not None
        # Not bincount, which synchronises with the device.
        rows = torch.stack(right)
        self.counts[: len(rows)].scatter_add_(1, label.expand_as(rows), rows)
        self.confusion.scatter_add_(0, label * self.counts.shape[1] + predicted, rows[0])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Sums over the ranks, and writes on rank 0 if it is time."""
        counts = trainer.strategy.reduce(self.counts, reduce_op="sum")
        confusion = trainer.strategy.reduce(self.confusion, reduce_op="sum")
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._finished = counts, confusion
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
        (counts, confusion), self._finished = self._finished, None
        self._written = time.monotonic()
        images, right, seen, teacher_right = counts.cpu().double()
        data = trainer.datamodule  # type: ignore[attr-defined]
        names = getattr(data, "class_names", None) or range(len(images))
        table = {"class": names, "images": images.long().tolist(), "accuracy": _percent(right, images)}
        if seen.any():
            table["teacher_accuracy"] = _percent(teacher_right, seen)
        write_csv(self.path, table)
        confusion = confusion.cpu().view(len(images), -1)
        labels, predicted = (index.tolist() for index in confusion.nonzero(as_tuple=True))
        found = {"class": [names[k] for k in labels], "predicted": [names[k] for k in predicted]}
        write_csv(self.path.with_name(CONFUSION), found | {"images": confusion[confusion > 0].tolist()})


def _percent(right: Tensor, images: Tensor) -> list[str]:
    """Formats percentages with four decimals; empty for classes without images."""
    return [f"{100 * a / b:.4f}" if b else "" for a, b in zip(right.tolist(), images.tolist(), strict=True)]
