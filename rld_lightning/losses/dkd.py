"""Decoupled knowledge distillation (DKD): Zhao et al., CVPR 2022, arXiv 2203.08679."""

import torch
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import (
    binary_kl,
    by_row_blocks,
    check_positive,
    check_weights,
    kl_rows,
    logit_rows,
    margin,
    masked_log_softmax,
)
from rld_lightning.losses.registry import register_loss


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """Target-class (TCKD) and non-target-class (NCKD) distillation, equations 5 to 7 of the paper.

    With teacher logits t, student logits s, label y and temperature T::

        TCKD = T^2 KL( [p, 1 - p] || [q, 1 - q] ),  p = softmax(t / T)_y,  q = softmax(s / T)_y
        NCKD = T^2 KL( softmax over k != y of t / T || softmax over k != y of s / T )

    Averaged over the batch. The published code lowers the true class by 1000 where this removes it, and takes the
    logarithm of a summed softmax where this stays in log space; values agree wherever the published ones are finite.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        label: ``(B,)`` or ``(B, *)`` class indices.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: softmax temperature of both terms.
        logit_standardization: z-score both logits first (LSKD, arXiv 2403.01427).
        ignore_index: label of samples that count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (then each term is ``(B, *)``).

    Returns:
        ``{"tckd": alpha * TCKD, "nckd": beta * NCKD}`` in nats.

    Raises:
        ValueError: shapes, class counts, labels or hyper-parameters that do not fit.
    """
    check_positive(temperature=temperature)
    check_weights(alpha=alpha, beta=beta)
    rows = logit_rows(
        student_logits,
        teacher_logits,
        label,
        ignore_index=ignore_index,
        reduction=reduction,
        logit_standardization=logit_standardization,
    )

    def row_losses(student: Tensor, teacher: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = student / temperature, teacher / temperature
        target = binary_kl(margin(teacher, label), margin(student, label))
        true = torch.zeros_like(teacher, dtype=torch.bool).scatter_(-1, label.unsqueeze(-1), True)
        return target, kl_rows(masked_log_softmax(teacher, true), masked_log_softmax(student, true))

    target, rest = by_row_blocks(row_losses, rows.student, rows.teacher, rows.label)
    return {
        "tckd": alpha * temperature**2 * rows.reduce(target, reduction),
        "nckd": beta * temperature**2 * rows.reduce(rest, reduction),
    }


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

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        logit_standardization: bool = False,
        *,
        ce_weight: float = 1.0,
        warmup_epochs: int = 20,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(ce_weight=ce_weight, warmup_epochs=warmup_epochs, ignore_index=ignore_index)
        check_weights(alpha=alpha, beta=beta)
        check_positive(temperature=temperature)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.logit_standardization = logit_standardization
