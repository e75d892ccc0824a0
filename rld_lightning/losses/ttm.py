"""Transformed teacher matching (TTM) and its weighted form (WTTM): Zheng and Yang, ICLR 2024, arXiv 2402.11148.

Only the teacher is softened: its probabilities are raised to a power, and the student matches them as it is. The
weighted form listens more to a teacher that is unsure.
"""

import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import by_row_blocks, check_weights, logit_rows, softmax_kl
from rld_lightning.losses.registry import register_loss


def ttm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    gamma: float,
    weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """``KL( softmax(gamma t) || softmax(s) )`` of teacher logits t and student logits s, averaged over the batch.

    ``softmax(gamma t)`` is the teacher's probabilities to the power gamma, made to sum to 1. No factor stands for the
    temperature ``1 / gamma``. The published code takes the power itself; values agree but for its underflow.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        label: ``(B,)`` or ``(B, *)``, only to leave out the samples that hold ``ignore_index``; ``None`` keeps all.
        gamma: the power, in (0, 1].
        weight: factor on the term (beta in the paper).
        ignore_index: label of samples that count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (then the term is ``(B, *)``).

    Returns:
        ``{"ttm": weight * TTM}`` in nats.

    Raises:
        ValueError: shapes, class counts, labels or hyper-parameters that do not fit.
    """
    _check_gamma(gamma)
    check_weights(weight=weight)
    rows = logit_rows(student_logits, teacher_logits, label, ignore_index=ignore_index, reduction=reduction)

    def row_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
        return (softmax_kl(gamma * teacher, student),)

    (divergence,) = by_row_blocks(row_losses, rows.student, rows.teacher)
    return {"ttm": weight * rows.reduce(divergence, reduction)}


def wttm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    gamma: float,
    weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """``U KL( softmax(gamma t) || softmax(s) )`` with ``U = sum_k softmax(t)_k^gamma``, averaged over the batch.

    U of a sample lies between 1 (a teacher that is sure) and ``C^(1 - gamma)`` (one that knows nothing); it is the
    power sum that :func:`ttm_loss` divides by.

    Args:
        student_logits: as in :func:`ttm_loss`.
        teacher_logits: as in :func:`ttm_loss`.
        label: as in :func:`ttm_loss`.
        gamma: the power, in (0, 1].
        weight: factor on the term (beta in the paper).
        ignore_index: label of samples that count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (then the term is ``(B, *)``).

    Returns:
        ``{"wttm": weight * WTTM}`` in nats.

    Raises:
        ValueError: shapes, class counts, labels or hyper-parameters that do not fit.
    """
    _check_gamma(gamma)
    check_weights(weight=weight)
    rows = logit_rows(student_logits, teacher_logits, label, ignore_index=ignore_index, reduction=reduction)

    def row_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
        divergence = softmax_kl(gamma * teacher, student)
        return (power_sum(teacher, gamma) * divergence,)

    (divergence,) = by_row_blocks(row_losses, rows.student, rows.teacher)
    return {"wttm": weight * rows.reduce(divergence, reduction)}


def power_sum(teacher: Tensor, gamma: float) -> Tensor:
    """``sum_k softmax(t)_k^gamma`` of each row of ``(N, C)`` logits: ``(N,)``."""
    return (gamma * F.log_softmax(teacher, -1)).logsumexp(-1).exp()


def _check_gamma(gamma: float) -> None:
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma={gamma!r} is not allowed; it must be > 0 and <= 1.")


@register_loss("ttm")
class TTMLoss(LogitLoss):
    """``ce_weight * CE + weight * TTM``; see :func:`ttm_loss`.

    Defaults are the one published example (vgg13 to vgg8 on CIFAR-100).
    """

    method = "Transformed teacher matching"
    papers = ("2402.11148",)

    function = staticmethod(ttm_loss)

    def __init__(
        self,
        gamma: float = 0.1,
        weight: float = 45.0,
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
        _check_gamma(gamma)
        check_weights(weight=weight)
        self.gamma = gamma
        self.weight = weight


@register_loss("wttm")
class WTTMLoss(LogitLoss):
    """``ce_weight * CE + weight * WTTM``; see :func:`wttm_loss`.

    Defaults are the one published example, which adds a contrastive loss to it.
    """

    method = "Transformed teacher matching, weighted by the teacher's uncertainty"
    papers = ("2402.11148",)

    function = staticmethod(wttm_loss)

    def __init__(
        self,
        gamma: float = 0.2,
        weight: float = 4.0,
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
        _check_gamma(gamma)
        check_weights(weight=weight)
        self.gamma = gamma
        self.weight = weight
