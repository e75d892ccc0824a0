"""Distillation from a stronger teacher (DIST): Huang et al., NeurIPS 2022, arXiv 2205.10536.

Probabilities need not be equal, only correlated: over the classes of each sample and over the samples of each class.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import check_positive, check_weights, logit_rows
from rld_lightning.losses.registry import register_loss


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    beta: float = 2.0,
    gamma: float = 2.0,
    temperature: float = 4.0,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """Correlation between classes and within classes.

    With teacher logits t, student logits s, ``P = softmax(t / T)`` and ``Q = softmax(s / T)``, both ``B x C``::

        inter = T^2 (1 - mean over samples of corr(P_i, Q_i))        rows
        intra = T^2 (1 - mean over classes of corr(P_.k, Q_.k))      columns
        corr(x, y) = <x - mean x, y - mean y> / (|x - mean x| |y - mean y| + 1e-8)

    The 1e-8 is the published code's: a row or column that is (almost) constant counts as uncorrelated, and equal
    logits give a little more than 0. In a batch of one sample every column is constant, so that intra is ``T^2``
    without a gradient.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        label: ``(B,)`` or ``(B, *)``, only to leave out the samples that hold ``ignore_index``; ``None`` keeps all.
        beta: weight of inter.
        gamma: weight of intra.
        temperature: softmax temperature of both.
        ignore_index: label of samples that count for nothing.

    Returns:
        ``{"inter": beta * inter, "intra": gamma * intra}``, scalars. There is no ``reduction``, because intra belongs
        to the whole batch.

    Raises:
        ValueError: shapes, class counts, labels or hyper-parameters that do not fit.
    """
    check_positive(temperature=temperature)
    check_weights(beta=beta, gamma=gamma)
    rows = logit_rows(student_logits, teacher_logits, label, ignore_index=ignore_index)
    valid = rows.valid if rows.valid is not None else torch.ones_like(rows.student[:, 0], dtype=torch.bool)
    valid = valid.unsqueeze(-1)
    # Whatever an ignored sample holds, neither columns nor gradients may meet it.
    q, p = (F.softmax(x.masked_fill(~valid, 0.0) / temperature, -1) for x in (rows.student, rows.teacher))
    inter = rows.reduce(1 - _correlation(p, q, torch.ones_like(valid), -1), "mean")
    intra = (1 - _correlation(p, q, valid, 0)).mean() * valid.any()
    return {"inter": beta * temperature**2 * inter, "intra": gamma * temperature**2 * intra}


def _correlation(p: Tensor, q: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Pearson correlation of ``p`` and ``q`` along ``dim``, over the entries that count."""
    count = valid.expand_as(p).sum(dim, keepdim=True).clamp(min=1)
    p, q = (valid * (x - (valid * x).sum(dim, keepdim=True) / count) for x in (p, q))
    return (p * q).sum(dim) / (p.norm(dim=dim) * q.norm(dim=dim) + 1e-8)


@register_loss("dist")
class DISTLoss(LogitLoss):
    """``ce_weight * CE + beta * inter + gamma * intra``; see :func:`dist_loss`.

    Defaults are those of CIFAR-100 in the authors' code, which writes them as a weight of 2 on the sum. On ImageNet:
    ``temperature=1``.
    """

    method = "Distillation from a stronger teacher"
    papers = ("2205.10536",)

    function = staticmethod(dist_loss)

    def __init__(
        self,
        beta: float = 2.0,
        gamma: float = 2.0,
        temperature: float = 4.0,
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
        check_weights(beta=beta, gamma=gamma)
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature
