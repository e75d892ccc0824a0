"""Decoupled knowledge distillation (DKD): Zhao et al., CVPR 2022, arXiv 2203.08679."""

from dataclasses import KW_ONLY

import torch
from torch import Tensor

from rld_lightning.losses.base import Epochs, LogitLoss
from rld_lightning.losses.divergences import margin, margin_kl, softmax_kl
from rld_lightning.losses.ranges import Positive, Weight
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss


@row_loss
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    *,
    alpha: Weight,
    beta: Weight,
    temperature: Positive,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Target-class (TCKD) and non-target-class (NCKD) distillation, equations 5 to 7 of the paper.

    With teacher logits t, student logits s, label y and temperature T::

        TCKD = T^2 KL( [p, 1 - p] || [q, 1 - q] ),  p = softmax(t / T)_y,  q = softmax(s / T)_y
        NCKD = T^2 KL( softmax over k != y of t / T || softmax over k != y of s / T )

    Averaged over the batch. The published code lowers the true class by 1000 where this removes it, and takes the
    logarithm of a summed softmax where this stays in log space; values agree wherever the published ones are finite.

    Args:
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: softmax temperature of both terms.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"tckd": alpha * TCKD, "nckd": beta * NCKD}`` in nats.
    """
    target, rest = decoupled_kl(teacher_logits / temperature, student_logits / temperature, label)
    return {"tckd": (alpha * temperature**2, target), "nckd": (beta * temperature**2, rest)}


def decoupled_kl(teacher: Tensor, student: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Divergences ``(N,)`` of the true class from the rest and within the rest, of tempered logits ``(N, C)``."""
    true = torch.zeros_like(teacher).scatter_(-1, label.unsqueeze(-1), 1.0)
    target = margin_kl(margin(teacher, label), student, label)
    return target, softmax_kl(teacher, student, drop=true)


@register_loss("dkd")
class DKDLoss(LogitLoss):
    """``ce_weight * CE + warmup * (alpha * TCKD + beta * NCKD)``; see :func:`dkd_loss`.

    Defaults are those of CIFAR-100 in the paper's code; it tunes ``beta`` (2, 6 or 8) for each teacher-student pair.
    On ImageNet: ``temperature=1, warmup_epochs=1``, ``beta=0.5`` (ResNet-34 to ResNet-18) or ``2``
    (ResNet-50 to MobileNetV1).
    """

    method = "Decoupled KD"
    papers = ("2203.08679",)
    function = staticmethod(dkd_loss)

    alpha: Weight = 1.0
    beta: Weight = 8.0
    temperature: Positive = 4.0
    logit_standardization: bool = False
    _: KW_ONLY
    warmup_epochs: Epochs = 20
