"""KD by approximation (KD-G), logit members: Hsu et al., "A Closer Look at Knowledge Distillation with Features,
Logits, and Gradients", arXiv 2203.10163.

To second order in ``d = s - t``, the divergence of two softmaxes is half the Fisher information of the first along d::

    KL( softmax(t) || softmax(s) ) ~ 1/2 d' F d,   F = E over y ~ softmax(t) of [ g g' ],   g = grad log softmax(t)_y

For logits, and for features with a linear classifier, this gives a family of losses: with the full F, its diagonal or
the identity. This is a reconstruction: no code of the paper is public, and its weights and temperatures are not known
to us. The members on features are in :mod:`rld_lightning.losses.features.kdg`.
"""

from dataclasses import KW_ONLY
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.ranges import Positive, Weight
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss

Weighting = Literal["fisher", "identity"]


@row_loss
def kdg_logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    weighting: Weighting = "fisher",
    temperature: Positive = 1.0,
    weight: Weight = 1.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Computes the squared difference of logits, weighted by the teacher, averaged over the batch.

    With student logits s, teacher logits t, ``d = s - t`` and ``p = softmax(t / T)``::

        fisher    1/2 d' (diag(p) - p p') d = 1/2 Var_p(d)    ~ T^2 KL( softmax(t / T) || softmax(s / T) )
        identity  1/2 |d|^2

    The first tends to ``|d - mean(d)|^2 / (2 C)`` for large T.

    Args:
        weighting: ``"fisher"`` (KD-logit-F) or ``"identity"`` (KD-logit-L2).
        temperature: T; not used by the identity.
        weight: factor on the term.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"kdg_logit": weight * loss}``.
    """
    difference = student_logits - teacher_logits
    if weighting == "identity":
        return {"kdg_logit": (weight, difference.square().sum(-1) / 2)}
    return {"kdg_logit": (weight, half_variance(difference, F.softmax(teacher_logits / temperature, -1)))}


def half_variance(values: Tensor, probs: Tensor) -> Tensor:
    """Returns ``1/2 sum_k p_k (x_k - sum_j p_j x_j)^2`` of each row of ``(N, C)`` values x and probabilities p."""
    centred = values - (probs * values).sum(-1, keepdim=True)
    return (probs * centred.square()).sum(-1) / 2


@register_loss("kdg_logit")
class KDGLogitLoss(LogitLoss):
    """``ce_weight * CE + weight * loss``; see :func:`kdg_logit_loss`.

    The paper's weights are not known to us. The defaults are those of plain KD on CIFAR-100, which the Fisher form
    approximates. The identity is about ``C`` times as large and needs a weight about ``C`` times as small.
    """

    method = "KD-G: logits weighted by the teacher's gradients (reconstruction)"
    papers = ("2203.10163",)
    function = staticmethod(kdg_logit_loss)

    weight: Weight = 0.9
    weighting: Weighting = "fisher"
    temperature: Positive = 4.0
    _: KW_ONLY
    logit_standardization: bool = False
    ce_weight: Weight = 0.1
