"""Dynamic temperature knowledge distillation (DTKD): Wei and Bai, arXiv 2404.12711.

For each sample, twice the base temperature is split between teacher and student in proportion to their largest logits.
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
    """Computes distillation at two temperatures per sample, and at a fixed one.

    With teacher logits t, student logits s and temperature T, averaged over the batch::

        DTKD = T_t T_s KL( softmax(t / T_t) || softmax(s / T_s) ),   T_t = 2 T max t / (max t + max s),
        KD   = T^2 KL( softmax(t / T) || softmax(s / T) )            T_s = 2 T max s / (max t + max s)

    Both temperatures depend on the student, and the gradient passes through them, as in the published code. They
    depend on the offset of the logits and are meaningful only if both maxima are > 0, which the published code does not
    check. Here maxima are clamped to at least 1e-7 (without gradient if clamped), so that every temperature is in
    (0, 2 T). Otherwise the values agree.

    Args:
        temperature: T, the mean of a sample's two temperatures.
        dtkd_weight: weight of DTKD (alpha in the published code).
        kd_weight: weight of KD (beta in the published code).
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"dtkd": dtkd_weight * DTKD, "kd": kd_weight * KD}`` in nats.
    """
    student_t, teacher_t = dynamic_temperatures(student_logits, teacher_logits, temperature)
    dtkd = (teacher_t * student_t).squeeze(-1) * softmax_kl(teacher_logits / teacher_t, student_logits / student_t)
    kd = softmax_kl(teacher_logits / temperature, student_logits / temperature)
    return {"dtkd": (dtkd_weight, dtkd), "kd": (kd_weight * temperature**2, kd)}


def dynamic_temperatures(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns the student's and the teacher's temperature ``(N, 1)`` of each row of ``(N, C)`` logits."""
    student_max, teacher_max = (logits.amax(-1, keepdim=True).clamp(min=1e-7) for logits in (student, teacher))
    scale = 2 * temperature / (student_max + teacher_max)
    return scale * student_max, scale * teacher_max


@register_loss("dtkd")
class DTKDLoss(LogitLoss):
    """``ce_weight * CE + warmup * (dtkd_weight * DTKD + kd_weight * KD)``; see :func:`dtkd_loss`.

    The defaults are those of the paper's code for CIFAR-100; for some pairs its configs set other weights
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
