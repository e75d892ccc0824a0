"""Normalized knowledge distillation (NKD): Yang et al., ICCV 2023, arXiv 2303.13005."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import (
    by_row_blocks,
    check_positive,
    check_weights,
    logit_rows,
    masked_log_softmax,
)
from rld_lightning.losses.registry import register_loss


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """Soft cross-entropy of the true class, and of the other classes among themselves.

    With teacher logits t, student logits s, label y and temperature T::

        target     = -softmax(t)_y log softmax(s)_y                                   (no temperature)
        non-target = -T^2 sum over k != y of p_k log q_k,  p, q = softmax over k != y of t / T, s / T

    Averaged over the batch. These are cross-entropies, not divergences: the non-target term has the gradient of DKD's
    NCKD, but exceeds it by the teacher's entropy and does not vanish.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        label: ``(B,)`` or ``(B, *)`` class indices.
        gamma: weight of the non-target term.
        temperature: softmax temperature of the non-target term.
        ignore_index: label of samples that count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (then each term is ``(B, *)``).

    Returns:
        ``{"target": target, "non_target": gamma * non-target}`` in nats.

    Raises:
        ValueError: shapes, class counts, labels or hyper-parameters that do not fit.
    """
    check_positive(temperature=temperature)
    check_weights(gamma=gamma)
    rows = logit_rows(student_logits, teacher_logits, label, ignore_index=ignore_index, reduction=reduction)

    def row_losses(student: Tensor, teacher: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        index = label.unsqueeze(-1)
        target = -F.softmax(teacher, -1).gather(-1, index) * F.log_softmax(student, -1).gather(-1, index)
        true = torch.zeros_like(teacher, dtype=torch.bool).scatter_(-1, index, True)
        probs = masked_log_softmax(teacher / temperature, true).exp()
        return target.squeeze(-1), -(probs * masked_log_softmax(student / temperature, true)).sum(-1)

    target, rest = by_row_blocks(row_losses, rows.student, rows.teacher, rows.label)
    return {
        "target": rows.reduce(target, reduction),
        "non_target": gamma * temperature**2 * rows.reduce(rest, reduction),
    }


@register_loss("nkd")
class NKDLoss(LogitLoss):
    """``ce_weight * CE + target + gamma * non-target``; see :func:`nkd_loss`.

    Defaults are the paper's for ImageNet. Its one CIFAR-100 pair (ResNet-34 to ResNet-18) takes
    ``gamma=3.5, temperature=3``.
    """

    method = "Normalized KD"
    papers = ("2303.13005",)

    function = staticmethod(nkd_loss)

    def __init__(
        self,
        gamma: float = 1.5,
        temperature: float = 1.0,
        *,
        ce_weight: float = 1.0,
        warmup_epochs: int = 1,
        ignore_index: int = -100,
        logit_standardization: bool = False,
    ) -> None:
        super().__init__(
            ce_weight=ce_weight,
            warmup_epochs=warmup_epochs,
            ignore_index=ignore_index,
            logit_standardization=logit_standardization,
        )
        check_positive(temperature=temperature)
        check_weights(gamma=gamma)
        self.gamma = gamma
        self.temperature = temperature
