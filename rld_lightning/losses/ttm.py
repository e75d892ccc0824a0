"""Transformed teacher matching (TTM): Zheng and Yang, ICLR 2024, arXiv 2402.11148.

Only the teacher's distribution is softened, by raising its probabilities to a power; the student has no temperature.
The weighted variant is :mod:`rld_lightning.losses.wttm`.
"""

from dataclasses import KW_ONLY

from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.divergences import softmax_kl
from rld_lightning.losses.ranges import Share, Weight
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss


@row_loss
def ttm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    gamma: Share,
    weight: Weight = 1.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Computes ``KL( softmax(gamma t) || softmax(s) )`` of teacher logits t and student logits s, batch mean.

    ``softmax(gamma t)`` are the teacher's probabilities to the power gamma, normalised to sum to 1. There is no squared
    temperature as factor. The published code computes the power directly; the values agree unless it underflows.

    Args:
        gamma: the power, in (0, 1].
        weight: factor on the term (beta in the paper).
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"ttm": weight * TTM}`` in nats.
    """
    return {"ttm": (weight, softmax_kl(gamma * teacher_logits, student_logits))}


@register_loss("ttm")
class TTMLoss(LogitLoss):
    """``ce_weight * CE + weight * TTM``; see :func:`ttm_loss`.

    The defaults are those of the only published example (vgg13 to vgg8 on CIFAR-100).
    """

    method = "Transformed teacher matching"
    papers = ("2402.11148",)
    function = staticmethod(ttm_loss)

    gamma: Share = 0.1
    weight: Weight = 45.0
    _: KW_ONLY
    logit_standardization: bool = False
