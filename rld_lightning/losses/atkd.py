"""Adaptive temperature from the largest logit (ATKD): Matsuyama et al., arXiv 2503.09030.

Each sample has its own temperature, just high enough for the distillation loss to approximate a correlation of logits.
"""

import math
from dataclasses import KW_ONLY
from typing import Annotated, Literal

from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.divergences import softmax_kl
from rld_lightning.losses.ranges import Weight, choose
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss

Source = Annotated[
    Literal["both", "teacher"], choose("'both' (the published code) or 'teacher' (the paper)", "both", "teacher")
]


@row_loss
def atkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    weight: Weight = 1.0,
    source: Source = "both",
    logit_standardization: bool = True,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Computes ``T^2 KL( softmax(t / T) || softmax(s / T) )`` of z-scored logits, with T chosen for each sample.

    With t and s the teacher's and the student's logits after z-scoring (LSKD, arXiv 2403.01427; the default here),
    averaged over the batch::

        T = (1 + sqrt 3) / 2 * max_k max(|t_k|, |s_k|)       without gradient

    Args:
        weight: factor on the term.
        source: the networks whose logits determine T: ``"both"`` (the published code) or ``"teacher"`` (the paper's
            abstract, which mentions only the teacher).
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"atkd": weight * ATKD}`` in nats.
    """
    temperature = adaptive_temperature(student_logits, teacher_logits, source)
    divergence = softmax_kl(teacher_logits / temperature, student_logits / temperature)
    return {"atkd": (weight, temperature.squeeze(-1).square() * divergence)}


def adaptive_temperature(student: Tensor, teacher: Tensor, source: Source) -> Tensor:
    """Returns the temperature of each row of ``(N, C)`` z-scored logits, ``(N, 1)``, without gradient."""
    largest = teacher.detach().abs().amax(-1, keepdim=True)
    if source == "both":
        largest = largest.maximum(student.detach().abs().amax(-1, keepdim=True))
    # If all logits are equal, any temperature except 0 gives the same result.
    return ((1 + math.sqrt(3)) / 2 * largest).clamp(min=1e-7)


@register_loss("atkd")
class ATKDLoss(LogitLoss):
    """``ce_weight * CE + weight * ATKD``; see :func:`atkd_loss`.

    The defaults are those of the published example on CIFAR-100.
    """

    method = "Temperature from each sample's largest logit"
    papers = ("2503.09030",)
    function = staticmethod(atkd_loss)

    weight: Weight = 9.0
    source: Source = "both"
    _: KW_ONLY
    logit_standardization: bool = True
    ce_weight: Weight = 0.1
