"""Averages of the student's weights over training: of the last steps (EMA), or of the last epochs (SWA)."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from rld_lightning.console import print_line
from rld_lightning.models.hold_outside import hold_outside
from rld_lightning.runs.checkpoint_form import refuse_other_averages


class WeightAverage(WeightAveraging):
    """Validates, checkpoints and leaves an average of the weights, while training goes on with the weights themselves.

    With ``decay``, a moving average (EMA) after each step of the optimizer::

        average <- d * average + (1 - d) * weights,   d = min(decay, (1 + n) / (10 + n)) after n updates

    as in TensorFlow's ``ExponentialMovingAverage``: the first updates, which start from the weights themselves, do not
    weigh for ever. Without ``decay``, the mean of the weights at the end of each epoch (SWA: Izmailov et al., UAI 2018,
    arXiv 1803.05407). Statistics of batch norms are averaged as weights are; SWA's authors measure them anew instead.

    Lightning's callback does the rest, but for this: the average lies on the training device, without a copy of the
    teacher; before its first update it is not there, where Lightning's would be the weights before training.

    Args:
        decay: d, in (0, 1); None for a mean of epochs.
        start: share of the epochs after which the average begins, in [0, 1).

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
        self.swapped = False  # whether the module has the average, and the average's place the weights

    @property
    def updates(self) -> int:
        """How often the average has been updated."""
        return 0 if self._average_model is None else int(self._average_model.n_averaged)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes room for the average where the weights will be."""
        if stage != "fit":
            return
        self._device, teacher = trainer.strategy.root_device, getattr(pl_module, "teacher", None)
        hold_outside(pl_module, "teacher", None)
        super().setup(trainer, pl_module, stage)
        hold_outside(pl_module, "teacher", teacher)
        assert self._average_model is not None
        self._average_model.n_averaged = self._average_model.n_averaged.cpu()  # where looking at it waits for nothing
        self.first_epoch = self.start * (trainer.max_epochs or 0)
        kind = "of all epochs (SWA)" if self.decay is None else f"moving, decay {self.decay:g} (EMA)"
        after = f", after {self.start:.0%} of the epochs" if self.start else ""
        print_line("average", f"{kind}{after}: validation, export and summary use the averaged weights")

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After each step for a moving average, after the last of each epoch for a mean."""
        return step_idx is not None and self.due

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average, before the epoch is validated."""
        self.due = trainer.current_epoch >= self.first_epoch and (self.decay is not None or trainer.is_last_batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the average in the weights' place, and these beside it; within a validation it is there already."""
        if self.updates:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            if self.swapped:
                keys = ("state_dict", "current_model_state")
                checkpoint |= zip(keys, [checkpoint[key] for key in reversed(keys)], strict=True)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts both back in their places."""
        begun = checkpoint["callbacks"].get(self.state_key, {}).get("latest_update_step", 0) > 0
        if self._average_model is not None and (begun or "averaging_state" in checkpoint):
            own = {"averaging_state": {"n_averaged": self._average_model.n_averaged}}
            refuse_other_averages(checkpoint, trainer, own | {"current_model_state": pl_module.state_dict()})
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the average also where a run went on and nothing was left to train."""
        if stage == "fit":  # after others may have saved the weights
            self._copy_average_to_current(pl_module)

    def _swap_models(self, pl_module: LightningModule) -> None:
        if self.updates:
            super()._swap_models(pl_module)
            self.swapped = not self.swapped

    def _copy_average_to_current(self, pl_module: LightningModule) -> None:
        if self.updates:
            super()._copy_average_to_current(pl_module)

    def _update(self, average: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        """Updates all tensors of one type; what counts is taken as it is."""
        n = self.updates
        decay = n / (n + 1) if self.decay is None else min(self.decay, (1 + n) / (10 + n))
        if average[0].is_floating_point():
            torch._foreach_lerp_(average, current, 1 - decay)
        else:
            torch._foreach_copy_(average, current)
