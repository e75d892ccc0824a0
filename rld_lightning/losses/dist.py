"""Distillation from a stronger teacher (DIST): Huang et al., NeurIPS 2022, arXiv 2205.10536.

The student's probabilities need not equal the teacher's, only correlate with them: over the classes of each sample and
over the samples of each class.
"""

from dataclasses import KW_ONLY
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import non_negative
from rld_lightning.losses.ranges import Positive, Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import logit_rows


@checked
def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    beta: Weight = 2.0,
    gamma: Weight = 2.0,
    temperature: Positive = 4.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Literal["mean"] = "mean",
) -> dict[str, Tensor]:
    """Computes the inter-class and intra-class correlation losses.

    With teacher logits t, student logits s, ``P = softmax(t / T)`` and ``Q = softmax(s / T)``, both ``B x C``::

        inter = T^2 (1 - mean over samples of corr(P_i, Q_i))        rows
        intra = T^2 (1 - mean over classes of corr(P_.k, Q_.k))      columns
        corr(x, y) = <x - mean x, y - mean y> / (|x - mean x| |y - mean y| + 1e-8)

    The 1e-8 is from the published code: an (almost) constant row or column counts as uncorrelated, and equal logits
    give slightly more than 0. In a batch of one sample every column is constant, so intra is ``T^2`` without gradient.

    Args:
        beta: weight of inter.
        gamma: weight of intra.
        temperature: T, the softmax temperature of both networks.
        reduction: only the mean, because intra is a value of the whole batch.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"inter": beta * inter, "intra": gamma * intra}``, scalars.
    """
    rows = logit_rows(
        student_logits,
        teacher_logits,
        label,
        logit_standardization=logit_standardization,
        ignore_index=ignore_index,
        temperature=temperature,
    )
    student, teacher, valid = rows.zeroed()
    q, p = (F.softmax(logits / temperature, -1) for logits in (student, teacher))
    valid = valid.unsqueeze(-1)
    inter = rows.reduce(non_negative(1 - _correlation(p, q, torch.ones_like(valid), -1)))
    intra = non_negative(1 - _correlation(p, q, valid, 0)).mean() * valid.any()
    return {"inter": beta * temperature**2 * inter, "intra": gamma * temperature**2 * intra}


def _correlation(p: Tensor, q: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Returns the Pearson correlation of ``p`` and ``q`` along ``dim``, over the valid entries."""
    count = valid.expand_as(p).sum(dim, keepdim=True).clamp(min=1)
    p, q = (valid * (x - (valid * x).sum(dim, keepdim=True) / count) for x in (p, q))
    return (p * q).sum(dim) / (p.norm(dim=dim) * q.norm(dim=dim) + 1e-8)


@register_loss("dist")
class DISTLoss(LogitLoss):
    """``ce_weight * CE + beta * inter + gamma * intra``; see :func:`dist_loss`.

    The defaults are those of the authors' code for CIFAR-100, which has them as a weight of 2 on the sum. On ImageNet:
    ``temperature=1``.
    """

    method = "Distillation from a stronger teacher"
    papers = ("2205.10536",)
    of_whole_batch = True
    function = staticmethod(dist_loss)

    beta: Weight = 2.0
    gamma: Weight = 2.0
    temperature: Positive = 4.0
    _: KW_ONLY
    logit_standardization: bool = False
