"""Review and correction (RC): Cao et al., "Be An Excellent Student", IEEE Signal Processing Letters 2023.

Only the correction, to which RLD (arXiv 2408.07703) is compared: in addition to the teacher, the student learns from
its own logits with the true class's logit raised.
"""

from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.divergences import softmax_kl
from rld_lightning.losses.ranges import Positive, Weight
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss


@row_loss
def rc_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    *,
    temperature: Positive,
    kd_weight: Weight = 1.0,
    rc_weight: Weight = 0.1,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Computes plain distillation, and distillation from the student's own corrected logits.

    With teacher logits t, student logits s, label y and temperature T, averaged over the batch::

        KD = T^2 KL( softmax(t / T) || softmax(s / T) )
        RC = T^2 KL( softmax(s' / T) || softmax(s / T) ),  s' = s, but s'_y = s_y + max_k s_k, without gradient

    RC depends on the offset of the logits: the true class becomes the largest only if ``s_y >= 0``, and if all logits
    are negative, its logit decreases. With standardization, s' is computed from the z-scores. The authors' code does
    not detach s', adapts the weight to the accuracies and adds feature losses; this follows RLD's public code, from
    which the compared numbers come.

    Args:
        temperature: softmax temperature of both terms.
        kd_weight: weight of KD.
        rc_weight: weight of RC.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"kd": kd_weight * KD, "rc": rc_weight * RC}`` in nats.
    """
    student = student_logits / temperature
    kd = softmax_kl(teacher_logits / temperature, student)
    rc = softmax_kl(correct_logits(student_logits.detach(), label) / temperature, student)
    return {"kd": (kd_weight * temperature**2, kd), "rc": (rc_weight * temperature**2, rc)}


def correct_logits(student: Tensor, label: Tensor) -> Tensor:
    """Returns ``(N, C)`` logits with each row's maximum added to its true class's logit."""
    true = label.unsqueeze(-1)
    return student.scatter(-1, true, student.gather(-1, true) + student.amax(-1, keepdim=True))


@register_loss("rc")
class RCLoss(LogitLoss):
    """``ce_weight * CE + kd_weight * KD + rc_weight * RC``; see :func:`rc_loss`.

    The defaults are those of RLD's public code for CIFAR-100. On ImageNet: ``temperature=1``.
    """

    method = "KD, and the student's own corrected logits"
    papers = ("IEEE SPL 2023",)
    function = staticmethod(rc_loss)

    temperature: Positive = 4.0
    kd_weight: Weight = 1.0
    rc_weight: Weight = 0.1
    logit_standardization: bool = False
