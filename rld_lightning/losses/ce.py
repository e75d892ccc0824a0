"""Cross-entropy with the labels alone: trains teachers, and is the baseline of every distillation method."""

from torch import Tensor

from rld_lightning.losses.base import DistillationLoss, StepContext
from rld_lightning.losses.registry import register_loss


@register_loss("ce")
class CELoss(DistillationLoss):
    """``ce_weight * CE``; the teacher is neither loaded nor run."""

    method = "Cross-entropy alone"
    needs_teacher = False

    def terms(self, step: StepContext) -> dict[str, Tensor]:
        """Returns no terms: the base class adds the cross-entropy."""
        return {}
