"""Averages of the student's weights: over the last steps (EMA), or over the last epochs (SWA)."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from rld_lightning.console import print_line
from rld_lightning.models.hold_outside import hold_outside
from rld_lightning.runs.checkpoint_form import refuse_other_averages


class WeightAverage(WeightAveraging):
    """Validates, checkpoints and exports an average of the weights; training continues with the weights themselves.

    With ``decay``, an exponential moving average (EMA) after each optimizer step::

        average <- d * average + (1 - d) * weights,   d = min(decay, (1 + n) / (10 + n)) after n updates

    as in TensorFlow's ``ExponentialMovingAverage``: so the first updates, which start from the weights themselves, do
    not dominate for long. Without ``decay``, the mean of the weights at the end of each epoch (SWA: Izmailov et al.,
    UAI 2018, arXiv 1803.05407). Batch-norm statistics are averaged like weights; SWA's authors recompute them instead.

    Differs from Lightning's callback in two ways: the average is on the training device, without a copy of the teacher;
    and it is not used before its first update, when Lightning's would be the weights before training.

    Args:
        decay: d, in (0, 1); None for a mean over epochs.
        start: fraction of the epochs after which averaging starts, in [0, 1).

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, decay: float | None = None, start: float = 0.0) -> None:
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"decay={decay} of averaged weights must be between 0 and 1, such as 0.999.")
        if not 0 <= start < 1:
            raise ValueError(f"start={start} of averaged weights is a share of the epochs, in [0, 1), such as 0.75.")
        super().__init__(multi_avg_fn=self._update)
        self.decay = decay
        self.start = start
        self.due = False
        self.swapped = False  # whether the module holds the average, and the averaged model the weights

    @property
    def updates(self) -> int:
        """Number of updates of the average."""
        return 0 if self._average_model is None else int(self._average_model.n_averaged)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Creates the averaged model on the training device."""
        if stage != "fit":
            return
        self._device, teacher = trainer.strategy.root_device, getattr(pl_module, "teacher", None)
        hold_outside(pl_module, "teacher", None)
        super().setup(trainer, pl_module, stage)
        hold_outside(pl_module, "teacher", teacher)
        assert self._average_model is not None
        self._average_model.n_averaged = (
            self._average_model.n_averaged.cpu()
        )  # on the CPU, so that reading it does not synchronise
        self.first_epoch = self.start * (trainer.max_epochs or 0)
        kind = "of all epochs (SWA)" if self.decay is None else f"moving, decay {self.decay:g} (EMA)"
        after = f", after {self.start:.0%} of the epochs" if self.start else ""
        print_line("average", f"{kind}{after}: validation, export and summary use the averaged weights")

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Updates after each step (EMA), or after each epoch's last step (SWA)."""
        return step_idx is not None and self.due

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average, before the epoch's validation."""
        self.due = trainer.current_epoch >= self.first_epoch and (self.decay is not None or trainer.is_last_batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the average as the weights, and the weights beside it; during validation they are swapped already."""
        if self.updates:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            if self.swapped:
                keys = ("state_dict", "current_model_state")
                checkpoint |= zip(keys, [checkpoint[key] for key in reversed(keys)], strict=True)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores both."""
        begun = checkpoint["callbacks"].get(self.state_key, {}).get("latest_update_step", 0) > 0
        if self._average_model is not None and (begun or "averaging_state" in checkpoint):
            own = {"averaging_state": {"n_averaged": self._average_model.n_averaged}}
            refuse_other_averages(checkpoint, trainer, own | {"current_model_state": pl_module.state_dict()})
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keeps the average as the weights, also if a resumed run had nothing left to train."""
        if stage == "fit":  # after other callbacks may have saved the weights
            self._copy_average_to_current(pl_module)

    def _swap_models(self, pl_module: LightningModule) -> None:
        if self.updates:
            super()._swap_models(pl_module)
            self.swapped = not self.swapped

    def _copy_average_to_current(self, pl_module: LightningModule) -> None:
        if self.updates:
            super()._copy_average_to_current(pl_module)

    def _update(self, average: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        """Updates all tensors of one type; integer tensors, such as counters, are copied."""
        n = self.updates
        decay = n / (n + 1) if self.decay is None else min(self.decay, (1 + n) / (10 + n))
        if average[0].is_floating_point():
            torch._foreach_lerp_(average, current, 1 - decay)
        else:
            torch._foreach_copy_(average, current)
