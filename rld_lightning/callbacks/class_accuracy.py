"""How good student and teacher are at each class."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from rld_lightning.module import DistillationModule
from rld_lightning.runs.files import CLASSES, write_csv


class ClassAccuracy(Callback):
    """Leaves ``classes.csv`` after each validation: one row a class, in the order of the labels.

    Its columns: ``class``, ``images``, ``accuracy`` of the student and, where
    :class:`~rld_lightning.callbacks.TeacherMonitor` runs before this one, ``teacher_accuracy``, in percent. A class
    without images has no accuracy.

    Args:
        dirpath: where to write.
    """

    def __init__(self, dirpath: str | Path) -> None:
        self.path = Path(dirpath) / CLASSES
        self.counts: Tensor | None = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Begins a validation."""
        classes = pl_module.hparams["num_classes"]
        # (4, C): images, right by the student, seen by the teacher, right by the teacher.
        self.counts = torch.zeros(4, classes, dtype=torch.long, device=trainer.strategy.root_device)

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
        right = [torch.ones_like(label), (outputs["student_logits"].argmax(1) == label).long()]
        if teacher is not None:
            right += [torch.ones_like(label), (teacher == label).long()]
        assert self.counts is not None  # made when the validation began
        # Not bincount, which waits for the device.
        rows = torch.stack(right)
        self.counts[: len(rows)].scatter_add_(1, label.expand_as(rows), rows)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Sums over the ranks, and writes on rank 0."""
        counts = trainer.strategy.reduce(self.counts, reduce_op="sum")
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        images, right, seen, teacher_right = counts.cpu().double()
        data = trainer.datamodule  # type: ignore[attr-defined]
        names = getattr(data, "class_names", None) or range(len(images))
        table = {"class": names, "images": images.long().tolist(), "accuracy": _percent(right, images)}
        if seen.any():
            table["teacher_accuracy"] = _percent(teacher_right, seen)
        write_csv(self.path, table)


def _percent(right: Tensor, images: Tensor) -> list[str]:
    """To four places; empty where there are no images."""
    return [f"{100 * a / b:.4f}" if b else "" for a, b in zip(right.tolist(), images.tolist(), strict=True)]
