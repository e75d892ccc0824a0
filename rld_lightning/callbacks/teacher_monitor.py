"""How good the teacher is on what the student sees, and how much the student follows it."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torchmetrics import MeanMetric

from rld_lightning.module import DistillationModule

METRICS = ("teacher_top1", "agreement")


class TeacherMonitor(Callback):
    """Logs ``teacher_top1`` and ``agreement`` (samples of equal prediction), in percent, for ``train/`` and ``val/``.

    On the training batches both come from logits that the step has computed anyway. Validation batches are the same in
    every epoch, so the teacher runs on them once and its predictions are kept. Does nothing without a teacher.
    """

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Makes the metrics on the module's device; they synchronise themselves over the ranks."""
        device = trainer.strategy.root_device
        self.metrics = {f"{split}/{name}": MeanMetric().to(device) for split in ("train", "val") for name in METRICS}
        self.predictions: dict[tuple[int, int], Tensor] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DistillationModule, outputs: dict[str, Tensor], batch: Any, batch_idx: int
    ) -> None:
        """Counts a training batch."""
        if "teacher_logits" in outputs:
            self._update("train", outputs["teacher_logits"].argmax(1), outputs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Logs the epoch's values."""
        self._log("train", pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: DistillationModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts a validation batch, asking the teacher the first time."""
        if pl_module.teacher is None or not len(batch.label):
            return
        key = (dataloader_idx, batch_idx)
        if key not in self.predictions:
            self.predictions[key] = pl_module.teacher(batch.images)[0].argmax(1)
        self._update("val", self.predictions[key], outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Logs the epoch's values."""
        self._log("val", pl_module)

    def _update(self, split: str, teacher: Tensor, outputs: dict[str, Tensor]) -> None:
        student = outputs["student_logits"].argmax(1)
        for name, hit in zip(METRICS, (teacher == outputs["label"], teacher == student), strict=True):
            self.metrics[f"{split}/{name}"].update(hit.to(torch.float32))

    def _log(self, split: str, pl_module: DistillationModule) -> None:
        if pl_module.teacher is None:
            return
        for name in METRICS:
            metric = self.metrics[f"{split}/{name}"]
            pl_module.log(f"{split}/{name}", 100 * metric.compute())
            metric.reset()
