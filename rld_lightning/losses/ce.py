"""Cross-entropy with the labels alone: how teachers are trained, and the baseline of every distillation."""

from torch import Tensor

from rld_lightning.losses.base import DistillationLoss, StepContext
from rld_lightning.losses.registry import register_loss


@register_loss("ce")
class CELoss(DistillationLoss):
    """``ce_weight * CE``, no teacher: it is neither loaded nor run."""

    method = "Cross-entropy alone"
    needs_teacher = False

    def terms(self, step: StepContext) -> dict[str, Tensor]:
        """Nothing beside the cross-entropy of the base class."""
        return {}
