"""Dynamic temperature knowledge distillation (DTKD): Wei and Bai, arXiv 2404.12711.

Teacher and student share twice the temperature between them in proportion to their largest logits, sample by sample.
"""

from dataclasses import KW_ONLY

from torch import Tensor

from rld_lightning.losses.base import Epochs, LogitLoss
from rld_lightning.losses.divergences import softmax_kl
from rld_lightning.losses.ranges import Positive, Weight
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss


@row_loss
def dtkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    temperature: Positive,
    dtkd_weight: Weight = 1.0,
    kd_weight: Weight = 1.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Distillation at two temperatures that each sample has for itself, and at a fixed one.

    With teacher logits t, student logits s and temperature T, averaged over the batch::

        DTKD = T_t T_s KL( softmax(t / T_t) || softmax(s / T_s) ),   T_t = 2 T max t / (max t + max s),
        KD   = T^2 KL( softmax(t / T) || softmax(s / T) )            T_s = 2 T max s / (max t + max s)

    Both temperatures move with the student, and the gradient passes through them, as in the published code. They
    depend on the offset of the logits and make sense only where both maxima are > 0. The code goes on with whatever
    comes out; here a maximum below 1e-7 counts as 1e-7, so that every temperature is in (0, 2 T), and passes no
    gradient. Elsewhere values agree.

    Args:
        temperature: T, the mean of the two temperatures of a sample.
        dtkd_weight: weight of DTKD (alpha in the published code).
        kd_weight: weight of KD (beta there).
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"dtkd": dtkd_weight * DTKD, "kd": kd_weight * KD}`` in nats.
    """
    of_student, of_teacher = dynamic_temperatures(student_logits, teacher_logits, temperature)
    scale = (of_teacher * of_student).squeeze(-1)
    dynamic = scale * softmax_kl(teacher_logits / of_teacher, student_logits / of_student)
    fixed = softmax_kl(teacher_logits / temperature, student_logits / temperature)
    return {"dtkd": (dtkd_weight, dynamic), "kd": (kd_weight * temperature**2, fixed)}


def dynamic_temperatures(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's temperature of each row of ``(N, C)`` logits, ``(N, 1)``; their mean is given."""
    largest_s, largest_t = (logits.amax(-1, keepdim=True).clamp(min=1e-7) for logits in (student, teacher))
    scale = 2 * temperature / (largest_s + largest_t)
    return scale * largest_s, scale * largest_t


@register_loss("dtkd")
class DTKDLoss(LogitLoss):
    """``ce_weight * CE + warmup * (dtkd_weight * DTKD + kd_weight * KD)``; see :func:`dtkd_loss`.

    Defaults are those of CIFAR-100 in the paper's code; for some pairs its configurations give other weights
    (``dtkd_weight`` 1 to 3, ``kd_weight`` 0.5 to 2).
    """

    method = "Dynamic temperature KD"
    papers = ("2404.12711",)
    function = staticmethod(dtkd_loss)

    temperature: Positive = 4.0
    dtkd_weight: Weight = 3.0
    kd_weight: Weight = 1.0
    _: KW_ONLY
    logit_standardization: bool = False
    warmup_epochs: Epochs = 20
