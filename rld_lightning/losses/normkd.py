"""Normalized logits for knowledge distillation (NormKD): Chi et al., arXiv 2308.00520.

Each sample has two temperatures, for teacher and student: a multiple of the standard deviation of their logits.
"""

from dataclasses import KW_ONLY

from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.divergences import softmax_kl
from rld_lightning.losses.numerics import standardize
from rld_lightning.losses.ranges import Positive, Weight
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss


@row_loss
def normkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    temperature: Positive,
    weight: Weight = 1.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Computes ``a^2 KL( softmax(t / a) || softmax(s / b) )`` with ``a = T std(t)`` and ``b = T std(s)``.

    For teacher logits t, student logits s and temperature T, averaged over the batch. The standard deviations of each
    sample have C - 1 in the denominator. The gradient passes through ``std(s)``, so the student's scale and offset do
    not matter. A sample whose teacher logits are all equal adds 0. Both logits are z-scored, which affects only the
    rounding of a large common offset; the 1e-7 added to the deviation keeps the loss finite for constant student
    logits, for which the published code divides by 0.

    Args:
        temperature: T, in standard deviations.
        weight: factor on the term.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"normkd": weight * NormKD}`` in nats.
    """
    scale = (temperature * teacher_logits.std(-1)).square()
    student, teacher = standardize(student_logits) / temperature, standardize(teacher_logits) / temperature
    return {"normkd": (weight, scale * softmax_kl(teacher, student))}


@register_loss("normkd")
class NormKDLoss(LogitLoss):
    """``ce_weight * CE + weight * NormKD``; see :func:`normkd_loss`.

    The defaults are those of the paper's code for CIFAR-100. On ImageNet: ``temperature=1, weight=0.5, ce_weight=0.5``.
    """

    method = "Logits scaled by their standard deviation"
    papers = ("2308.00520",)
    function = staticmethod(normkd_loss)

    temperature: Positive = 2.0
    weight: Weight = 0.9
    _: KW_ONLY
    logit_standardization: bool = False
    ce_weight: Weight = 0.1
