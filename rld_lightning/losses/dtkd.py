"""Dynamic temperature knowledge distillation (DTKD): Wei and Bai, arXiv 2404.12711.

Teacher and student share twice the temperature between them in proportion to their largest logits, sample by sample.
"""

from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import by_row_blocks, check_positive, check_weights, logit_rows, softmax_kl
from rld_lightning.losses.registry import register_loss


def dtkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    temperature: float,
    dtkd_weight: float = 1.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """Distillation at two temperatures that each sample has for itself, and at a fixed one.

    With teacher logits t, student logits s and temperature T, averaged over the batch::

        DTKD = T_t T_s KL( softmax(t / T_t) || softmax(s / T_s) ),   T_t = 2 T max t / (max t + max s),
        KD   = T^2 KL( softmax(t / T) || softmax(s / T) )            T_s = 2 T max s / (max t + max s)

    Both temperatures move with the student, and the gradient passes through them, as in the published code. They
    depend on the offset of the logits and make sense only where both maxima are > 0. The code goes on with whatever
    comes out; here a maximum below 1e-7 counts as 1e-7, so that every temperature is in (0, 2 T), and passes no
    gradient. Elsewhere values agree.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        label: ``(B,)`` or ``(B, *)``, only to leave out the samples that hold ``ignore_index``; ``None`` keeps all.
        temperature: T, the mean of the two temperatures of a sample.
        dtkd_weight: weight of DTKD (alpha in the published code).
        kd_weight: weight of KD (beta there).
        ignore_index: label of samples that count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (then each term is ``(B, *)``).

    Returns:
        ``{"dtkd": dtkd_weight * DTKD, "kd": kd_weight * KD}`` in nats.

    Raises:
        ValueError: shapes, class counts, labels or hyper-parameters that do not fit.
    """
    check_positive(temperature=temperature)
    check_weights(dtkd_weight=dtkd_weight, kd_weight=kd_weight)
    rows = logit_rows(student_logits, teacher_logits, label, ignore_index=ignore_index, reduction=reduction)

    def row_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        of_student, of_teacher = dynamic_temperatures(student, teacher, temperature)
        scale = (of_teacher * of_student).squeeze(-1)
        dynamic = scale * softmax_kl(teacher / of_teacher, student / of_student)
        return dynamic, softmax_kl(teacher / temperature, student / temperature)

    dynamic, fixed = by_row_blocks(row_losses, rows.student, rows.teacher)
    return {
        "dtkd": dtkd_weight * rows.reduce(dynamic, reduction),
        "kd": kd_weight * temperature**2 * rows.reduce(fixed, reduction),
    }


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

    def __init__(
        self,
        temperature: float = 4.0,
        dtkd_weight: float = 3.0,
        kd_weight: float = 1.0,
        *,
        ce_weight: float = 1.0,
        warmup_epochs: int = 20,
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
        check_weights(dtkd_weight=dtkd_weight, kd_weight=kd_weight)
        self.temperature = temperature
        self.dtkd_weight = dtkd_weight
        self.kd_weight = kd_weight
