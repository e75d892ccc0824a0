"""Accuracy of the teacher on the student's inputs, and agreement of the student with it."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from rld_lightning.data.base import as_batch
from rld_lightning.metrics import EpochMeans, counts, percent
from rld_lightning.module import DistillationModule
from rld_lightning.trainer_callbacks import measured_in_graph

_SAMPLES = ("teacher_top1", "agreement", "teacher_wrong", "right_alone")  # averaged


class TeacherMonitor(Callback):
    """Logs ``teacher_top1``, ``agreement`` (samples with equal predictions) and ``top1_teacher_wrong``, in percent.

    For ``train/`` and ``val/``; the last is the student's accuracy on the samples that the teacher gets wrong, and
    is absent if there are none.

    On training batches they are computed from logits that the step has anyway. Validation batches are the same in every
    epoch, so the teacher runs on them once and its predictions are cached; later callbacks find them in the outputs of
    the validation step, as ``teacher_prediction``. Does nothing without a teacher.
    """

    def __init__(self) -> None:
        self.means = {split: EpochMeans() for split in ("train", "val")}
        self.predictions: dict[tuple[int, int], Tensor] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Resets the means. (Not called when a run resumes within an epoch.)"""
        self.means["train"].reset()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DistillationModule, outputs: dict[str, Tensor], batch: Any, batch_idx: int
    ) -> None:
        """Counts a training batch."""
        measured = measured_in_graph(self, pl_module)
        counted = self.measure_step(pl_module, outputs, batch) if measured is None else measured
        if counted is not None:
            self.means["train"].add(_SAMPLES, counted)

    def measure_step(self, pl_module: DistillationModule, outputs: Mapping[str, Tensor], batch: Any) -> Tensor | None:
        """Returns a training batch's counts, see :class:`~rld_lightning.trainer_callbacks.Watcher`."""
        if "teacher_logits" not in outputs:
            return None
        return _count(outputs["teacher_logits"].argmax(1), outputs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Logs the epoch's means."""
        self._log("train", trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Resets the means."""
        self.means["val"].reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: DistillationModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts a validation batch; runs the teacher on it the first time."""
        if pl_module.teacher is None:
            return
        batch, key = as_batch(batch), (dataloader_idx, batch_idx)
        if not len(batch.label) and not pl_module.teacher.shard:  # a sharded teacher runs on all ranks or none
            self.predictions[key] = batch.label
        if key not in self.predictions:
            # Hooks run outside the step's autocast: this is in float32, as the student's evaluation is.
            self.predictions[key] = pl_module.teacher.validate(batch.images, batch.index, batch.label).argmax(1)
        outputs["teacher_prediction"] = self.predictions[key]
        self.means["val"].add(_SAMPLES, _count(self.predictions[key], outputs))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Logs the epoch's means."""
        self._log("val", trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch's counts so far."""
        return {"train": self.means["train"].state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts."""
        self.means["train"].load_state_dict(state_dict["train"])

    def _log(self, split: str, trainer: Trainer, pl_module: DistillationModule) -> None:
        means = self.means[split].compute(trainer.strategy.reduce)
        if means:
            # A ratio of means over the same samples is a ratio of counts: exact over batches and ranks.
            wrong, alone = means.pop("teacher_wrong"), means.pop("right_alone")
            if wrong > 0:
                means["top1_teacher_wrong"] = 100 * alone / wrong
        pl_module.log_dict({f"{split}/{name}": value for name, value in means.items()})


def _count(teacher: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
    """Counts ``_SAMPLES``, given the teacher's predictions, int64 ``(B,)``."""
    student, label = outputs["student_logits"].argmax(1), outputs["label"]
    wrong = teacher != label
    samples = torch.stack([~wrong, teacher == student, wrong, wrong & (student == label)])
    return counts(percent(samples), len(teacher))
