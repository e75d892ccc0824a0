"""How long the gradient is that an optimiser step gets."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer


class GradientNorm(Callback):
    """Logs ``train/grad_norm``: the total 2-norm of the gradient before clipping, mean over the epoch's steps.

    Of all that is optimised together: the student and the learnable parts of the loss. It is taken where Lightning
    would clip: after gradients have been accumulated, averaged over the ranks and unscaled. Steps whose gradient is not
    finite, which a gradient scaler skips, do not count. Nothing is read from the device before the epoch ends.
    """

    def __init__(self) -> None:
        self.totals: torch.Tensor | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins an epoch."""
        self.totals = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Adds a step."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        norm = torch.nn.utils.get_total_norm(gradients).float()
        counts = norm.isfinite()
        step = torch.stack([torch.where(counts, norm, 0.0), counts.float()])
        self.totals = step if self.totals is None else self.totals.to(step.device) + step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the mean; all ranks have the same gradient."""
        if self.totals is None:
            return
        total, steps = self.totals.tolist()
        if steps:
            pl_module.log("train/grad_norm", total / steps)

    def state_dict(self) -> dict[str, Any]:
        """What the epoch has counted so far, the same on all ranks."""
        return {} if self.totals is None else {"totals": self.totals.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self.totals = state_dict.get("totals")
