"""Normalized logits for knowledge distillation (NormKD): Chi et al., arXiv 2308.00520.

Each sample has its own temperature, a multiple of the spread of its logits, one for the teacher and one for the
student.
"""

from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import (
    by_row_blocks,
    check_positive,
    check_weights,
    logit_rows,
    softmax_kl,
    standardize,
)
from rld_lightning.losses.registry import register_loss


def normkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    temperature: float,
    weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """``a^2 KL( softmax(t / a) || softmax(s / b) )`` with ``a = T std(t)`` and ``b = T std(s)``.

    Teacher logits t, student logits s, temperature T; the standard deviations of each sample have C - 1 in the
    denominator; averaged over the batch. The gradient passes through ``std(s)``, so that the student's scale and
    offset do not matter. A sample whose teacher logits are all equal adds 0. Both logits are z-scored, which changes
    nothing but the rounding of a large common offset, and 1e-7 beside the deviation keeps a constant student finite;
    the published code divides by 0 there.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        label: ``(B,)`` or ``(B, *)``, only to leave out the samples that hold ``ignore_index``; ``None`` keeps all.
        temperature: T, in standard deviations.
        weight: factor on the term.
        ignore_index: label of samples that count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (then the term is ``(B, *)``).

    Returns:
        ``{"normkd": weight * NormKD}`` in nats.

    Raises:
        ValueError: shapes, class counts, labels or hyper-parameters that do not fit.
    """
    check_positive(temperature=temperature)
    check_weights(weight=weight)
    rows = logit_rows(student_logits, teacher_logits, label, ignore_index=ignore_index, reduction=reduction)

    def row_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
        scale = (temperature * teacher.std(-1)).square()
        student, teacher = standardize(student) / temperature, standardize(teacher) / temperature
        return (scale * softmax_kl(teacher, student),)

    (divergence,) = by_row_blocks(row_losses, rows.student, rows.teacher)
    return {"normkd": weight * rows.reduce(divergence, reduction)}


@register_loss("normkd")
class NormKDLoss(LogitLoss):
    """``ce_weight * CE + weight * NormKD``; see :func:`normkd_loss`.

    Defaults are those of CIFAR-100 in the paper's code. On ImageNet: ``temperature=1, weight=0.5, ce_weight=0.5``.
    """

    method = "Logits scaled by their standard deviation"
    papers = ("2308.00520",)

    function = staticmethod(normkd_loss)

    def __init__(
        self,
        temperature: float = 2.0,
        weight: float = 0.9,
        *,
        ce_weight: float = 0.1,
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
        check_weights(weight=weight)
        self.temperature = temperature
        self.weight = weight
