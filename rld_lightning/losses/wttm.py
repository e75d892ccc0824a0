"""Weighted transformed teacher matching (WTTM): Zheng and Yang, ICLR 2024, arXiv 2402.11148.

:mod:`rld_lightning.losses.ttm` with a larger weight for samples on which the teacher is unsure.
"""

from dataclasses import KW_ONLY

import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.divergences import softmax_kl
from rld_lightning.losses.ranges import Share, Weight
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss


@row_loss
def wttm_loss(
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
    """Computes ``U KL( softmax(gamma t) || softmax(s) )`` with ``U = sum_k softmax(t)_k^gamma``, batch mean.

    For teacher logits t and student logits s. U of a sample is between 1 (the teacher is certain) and ``C^(1 - gamma)``
    (its prediction is uniform); :func:`~rld_lightning.losses.ttm.ttm_loss` normalises by this power sum.

    Args:
        gamma: the power, in (0, 1].
        weight: factor on the term (beta in the paper).
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"wttm": weight * WTTM}`` in nats.
    """
    return {"wttm": (weight, power_sum(teacher_logits, gamma) * softmax_kl(gamma * teacher_logits, student_logits))}


def power_sum(teacher: Tensor, gamma: float) -> Tensor:
    """Returns ``sum_k softmax(t)_k^gamma`` of each row of ``(N, C)`` logits: ``(N,)``."""
    return (gamma * F.log_softmax(teacher, -1)).logsumexp(-1).exp()


@register_loss("wttm")
class WTTMLoss(LogitLoss):
    """``ce_weight * CE + weight * WTTM``; see :func:`wttm_loss`.

    The defaults are those of the only published example, which adds a contrastive loss (CRD).
    """

    method = "Transformed teacher matching, weighted by the teacher's uncertainty"
    papers = ("2402.11148",)
    function = staticmethod(wttm_loss)

    gamma: Share = 0.2
    weight: Weight = 4.0
    _: KW_ONLY
    logit_standardization: bool = False
