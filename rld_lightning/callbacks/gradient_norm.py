"""Norm of the gradient of each optimizer step."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from rld_lightning.trainer_callbacks import measured_in_graph


class GradientNorm(Callback):
    """Logs ``train/grad_norm``: the total 2-norm of the gradient before clipping, averaged over the epoch's steps.

    Over all optimised parameters: the student's and the loss's. It is computed where Lightning would clip: after
    gradients have been accumulated, averaged over the ranks and unscaled. Steps with a non-finite gradient, which a
    gradient scaler skips, do not count. Nothing is read from the device before the epoch ends.
    """

    def __init__(self) -> None:
        self.totals: Tensor | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resets the sum."""
        self.totals = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Adds a step's norm."""
        measured = measured_in_graph(self, pl_module)
        step = _norm(p for group in optimizer.param_groups for p in group["params"]) if measured is None else measured
        if step is not None:
            self.totals = step.clone() if self.totals is None else self.totals.to(step.device) + step

    def measure_step(self, pl_module: LightningModule, outputs: Mapping[str, Tensor], batch: Any) -> Tensor | None:
        """Returns a step's norm and count, see :class:`~rld_lightning.trainer_callbacks.Watcher`."""
        return _norm(pl_module.parameters())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the mean; all ranks have the same gradient."""
        if self.totals is None:
            return
        total, steps = self.totals.tolist()
        if steps:
            pl_module.log("train/grad_norm", total / steps)

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch's sum so far, the same on all ranks."""
        return {"totals": torch.zeros(2) if self.totals is None else self.totals.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the sum."""
        self.totals = state_dict.get("totals")


def _norm(parameters: Iterable[Tensor]) -> Tensor | None:
    """Returns the gradients' 2-norm and 1, or 0 and 0 if it is not finite, ``(2,)``; None without gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return None
    norm = torch.nn.utils.get_total_norm(gradients).float()
    return torch.stack([norm.nan_to_num(0.0, 0.0), (norm < torch.inf).float()])
