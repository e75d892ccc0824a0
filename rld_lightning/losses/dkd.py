"""Decoupled knowledge distillation (DKD): Zhao et al., CVPR 2022, arXiv 2203.08679."""

from dataclasses import KW_ONLY

from torch import Tensor

from rld_lightning.losses.base import Epochs, LogitLoss
from rld_lightning.losses.divergences import float_class_mask, margin, margin_kl, softmax_kl
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
    """Computes target-class (TCKD) and non-target-class (NCKD) distillation, equations 5 to 7 of the paper.

    With teacher logits t, student logits s, label y and temperature T::

        TCKD = T^2 KL( [p, 1 - p] || [q, 1 - q] ),  p = softmax(t / T)_y,  q = softmax(s / T)_y
        NCKD = T^2 KL( softmax over k != y of t / T || softmax over k != y of s / T )

    Averaged over the batch. NCKD removes the true class, where the published code subtracts 1000 from its logit. TCKD
    is computed in log space, where the published code takes the logarithm of a summed softmax. The values agree
    whenever the published ones are finite.

    Args:
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: softmax temperature of both terms.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"tckd": alpha * TCKD, "nckd": beta * NCKD}`` in nats.
    """
    tckd, nckd = decoupled_kl(teacher_logits / temperature, student_logits / temperature, label)
    return {"tckd": (alpha * temperature**2, tckd), "nckd": (beta * temperature**2, nckd)}


def decoupled_kl(teacher: Tensor, student: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Returns TCKD and NCKD ``(N,)`` of each row, without ``T^2``, from logits ``(N, C)`` divided by T."""
    tckd = margin_kl(margin(teacher, label), student, label)  # from the log-odds of p, and the logits of q
    return tckd, softmax_kl(teacher, student, drop=float_class_mask(teacher, label))


@register_loss("dkd")
class DKDLoss(LogitLoss):
    """``ce_weight * CE + warmup * (alpha * TCKD + beta * NCKD)``; see :func:`dkd_loss`.

    The defaults are those of the paper's code for CIFAR-100, which tunes ``beta`` (2, 6 or 8) for each pair.
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
