"""Adaptive temperature from the largest logit (ATKD): Matsuyama et al., arXiv 2503.09030.

Each sample has its own temperature, just high enough for the distillation loss to act as a correlation of logits.
"""

import math

from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import by_row_blocks, check_weights, logit_rows, softmax_kl
from rld_lightning.losses.registry import register_loss

SOURCES = ("both", "teacher")


def atkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    weight: float = 1.0,
    source: str = "both",
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """``T^2 KL( softmax(t / T) || softmax(s / T) )`` of z-scored logits, T chosen for each sample.

    With t and s the teacher's and the student's logits after z-scoring (LSKD, arXiv 2403.01427), averaged over the
    batch::

        T = (1 + sqrt 3) / 2 * max_k max(|t_k|, |s_k|)       without gradient

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        label: ``(B,)`` or ``(B, *)``, only to leave out the samples that hold ``ignore_index``; ``None`` keeps all.
        weight: factor on the term.
        source: whose scores T looks at: ``"both"`` (the published code) or ``"teacher"`` (the paper's abstract, which
            speaks of the teacher alone).
        ignore_index: label of samples that count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (then the term is ``(B, *)``).

    Returns:
        ``{"atkd": weight * ATKD}`` in nats.

    Raises:
        ValueError: shapes, class counts, labels or hyper-parameters that do not fit.
    """
    check_weights(weight=weight)
    _check_source(source)
    rows = logit_rows(
        student_logits,
        teacher_logits,
        label,
        ignore_index=ignore_index,
        reduction=reduction,
        logit_standardization=True,
    )

    def row_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
        temperature = adaptive_temperature(student, teacher, source)
        divergence = softmax_kl(teacher / temperature, student / temperature)
        return (temperature.squeeze(-1).square() * divergence,)

    (divergence,) = by_row_blocks(row_losses, rows.student, rows.teacher)
    return {"atkd": weight * rows.reduce(divergence, reduction)}


def adaptive_temperature(student: Tensor, teacher: Tensor, source: str) -> Tensor:
    """The temperature of each row of ``(N, C)`` z-scored logits, ``(N, 1)``, without gradient."""
    largest = teacher.detach().abs().amax(-1, keepdim=True)
    if source == "both":
        largest = largest.maximum(student.detach().abs().amax(-1, keepdim=True))
    # All logits equal: any temperature will do, but for 0.
    return ((1 + math.sqrt(3)) / 2 * largest).clamp(min=1e-7)


def _check_source(source: str) -> None:
    if source not in SOURCES:
        raise ValueError(f"source={source!r} is unknown; choose 'both' (the published code) or 'teacher' (the paper).")


@register_loss("atkd")
class ATKDLoss(LogitLoss):
    """``ce_weight * CE + weight * ATKD``; see :func:`atkd_loss`. Defaults are the published example on CIFAR-100."""

    method = "Temperature from each sample's largest logit"
    papers = ("2503.09030",)

    function = staticmethod(atkd_loss)

    def __init__(
        self,
        weight: float = 9.0,
        source: str = "both",
        *,
        ce_weight: float = 0.1,
        warmup_epochs: int = 1,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(ce_weight=ce_weight, warmup_epochs=warmup_epochs, ignore_index=ignore_index)
        check_weights(weight=weight)
        _check_source(source)
        self.weight = weight
        self.source = source
