"""How good the teacher is on what the student sees, and how much the student follows it."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from rld_lightning.epoch_means import EpochMeans
from rld_lightning.module import DistillationModule


class TeacherMonitor(Callback):
    """Logs ``teacher_top1`` and ``agreement`` (samples of equal prediction), in percent, for ``train/`` and ``val/``.

    On the training batches both come from logits that the step has computed anyway. Validation batches are the same in
    every epoch, so the teacher runs on them once and its predictions are kept. Does nothing without a teacher.
    """

    def __init__(self) -> None:
        self.means = {split: EpochMeans() for split in ("train", "val")}
        self.predictions: dict[tuple[int, int], Tensor] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DistillationModule, outputs: dict[str, Tensor], batch: Any, batch_idx: int
    ) -> None:
        """Counts a training batch."""
        if "teacher_logits" in outputs:
            self._update("train", outputs["teacher_logits"].argmax(1), outputs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Logs the epoch's values."""
        self._log("train", trainer, pl_module)

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
        if pl_module.teacher is None:
            return
        key = (dataloader_idx, batch_idx)
        if not len(batch.label) and not pl_module.teacher.shard:  # one that is shared out runs in all processes or none
            self.predictions[key] = batch.label
        if key not in self.predictions:
            with trainer.precision_plugin.forward_context():  # hooks run outside the step's own
                self.predictions[key] = pl_module.teacher(batch.images)[0].argmax(1)
        self._update("val", self.predictions[key], outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Logs the epoch's values."""
        self._log("val", trainer, pl_module)

    def _update(self, split: str, teacher: Tensor, outputs: dict[str, Tensor]) -> None:
        right, agree = teacher == outputs["label"], teacher == outputs["student_logits"].argmax(1)
        self.means[split].update(
            {"teacher_top1": 100 * right.float().mean(), "agreement": 100 * agree.float().mean()}, len(teacher)
        )

    def _log(self, split: str, trainer: Trainer, pl_module: DistillationModule) -> None:
        means = self.means[split].compute(trainer.strategy.reduce)
        pl_module.log_dict({f"{split}/{name}": value for name, value in means.items()})
