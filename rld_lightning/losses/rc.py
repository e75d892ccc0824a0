"""Review and correction (RC): Cao et al., "Be An Excellent Student", IEEE Signal Processing Letters 2023.

Only the correction, as RLD (arXiv 2408.07703) compares with it: beside the teacher, the student learns from its own
logits, in which the true class has been raised.
"""

import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import by_row_blocks, check_positive, check_weights, kl_rows, logit_rows
from rld_lightning.losses.registry import register_loss


def rc_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    *,
    temperature: float,
    kd_weight: float = 1.0,
    rc_weight: float = 0.1,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """Plain distillation, and distillation from the student's own corrected logits.

    With teacher logits t, student logits s, label y and temperature T, averaged over the batch::

        KD = T^2 KL( softmax(t / T) || softmax(s / T) )
        RC = T^2 KL( softmax(s' / T) || softmax(s / T) ),  s' = s, but s'_y = s_y + max_k s_k, without gradient

    RC depends on the offset of the logits: the corrected class leads only where ``s_y >= 0``, and a row of negative
    logits lowers it. The authors' own code lets the gradient through s', adapts the weight to the accuracies and adds
    feature losses; this follows the public code of RLD, where the compared numbers come from.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        label: ``(B,)`` or ``(B, *)`` class indices.
        temperature: softmax temperature of both terms.
        kd_weight: weight of KD.
        rc_weight: weight of RC.
        logit_standardization: z-score both logits first (LSKD, arXiv 2403.01427); s' is made of the scores.
        ignore_index: label of samples that count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (then each term is ``(B, *)``).

    Returns:
        ``{"kd": kd_weight * KD, "rc": rc_weight * RC}`` in nats.

    Raises:
        ValueError: shapes, class counts, labels or hyper-parameters that do not fit.
    """
    check_positive(temperature=temperature)
    check_weights(kd_weight=kd_weight, rc_weight=rc_weight)
    rows = logit_rows(
        student_logits,
        teacher_logits,
        label,
        ignore_index=ignore_index,
        reduction=reduction,
        logit_standardization=logit_standardization,
    )

    def row_losses(student: Tensor, teacher: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = F.log_softmax(student / temperature, -1)
        corrected = correct_logits(student.detach(), label)
        distilled = kl_rows(F.log_softmax(teacher / temperature, -1), log_probs)
        return distilled, kl_rows(F.log_softmax(corrected / temperature, -1), log_probs)

    distilled, corrected = by_row_blocks(row_losses, rows.student, rows.teacher, rows.label)
    return {
        "kd": kd_weight * temperature**2 * rows.reduce(distilled, reduction),
        "rc": rc_weight * temperature**2 * rows.reduce(corrected, reduction),
    }


def correct_logits(student: Tensor, label: Tensor) -> Tensor:
    """``(N, C)`` logits with each row's maximum added to its true class's."""
    true = label.unsqueeze(-1)
    return student.scatter(-1, true, student.gather(-1, true) + student.amax(-1, keepdim=True))


@register_loss("rc")
class RCLoss(LogitLoss):
    """``ce_weight * CE + kd_weight * KD + rc_weight * RC``; see :func:`rc_loss`.

    Defaults are those of CIFAR-100 in the public code of RLD. On ImageNet: ``temperature=1``.
    """

    method = "KD, and the student's own corrected logits"
    papers = ("IEEE SPL 2023",)

    function = staticmethod(rc_loss)

    def __init__(
        self,
        temperature: float = 4.0,
        kd_weight: float = 1.0,
        rc_weight: float = 0.1,
        logit_standardization: bool = False,
        *,
        ce_weight: float = 1.0,
        warmup_epochs: int = 1,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(ce_weight=ce_weight, warmup_epochs=warmup_epochs, ignore_index=ignore_index)
        check_positive(temperature=temperature)
        check_weights(kd_weight=kd_weight, rc_weight=rc_weight)
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.rc_weight = rc_weight
        self.logit_standardization = logit_standardization
