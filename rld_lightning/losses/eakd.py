"""Entropy-based adaptive knowledge distillation (EA-KD): Su et al., ICCV 2025, arXiv 2311.13621.

Weights the per-sample loss of another method by the uncertainty of teacher and student: KD's here, DKD's in
:mod:`rld_lightning.losses.eadkd`.
"""

import math
from dataclasses import KW_ONLY

import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.divergences import softmax_kl
from rld_lightning.losses.ranges import Positive, Weight
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss


@row_loss
def eakd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    temperature: Positive,
    weight: Weight = 1.0,
    entropy_temperature: Positive = 3.0,
    entropy_bound: Positive | None = 100.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Computes :func:`~rld_lightning.losses.kd.kd_loss`, each sample weighted by entropies, averaged over the batch.

    With teacher logits t, student logits s and H the entropy of their softmax at ``entropy_temperature``::

        EA-KD = w T^2 KL( softmax(t / T) || softmax(s / T) ),   w = H(t) / 2 (1 + H(s) / entropy_bound)

    w carries no gradient, and its mean over the batch is not 1.

    Args:
        temperature: T, the softmax temperature of KD.
        weight: factor on the term.
        entropy_temperature: softmax temperature of the entropies.
        entropy_bound: divisor of H(s). 100 as in the published code on all data but ImageNet, which almost disables the
            student's part; or ``None`` for the upper bound log C of H(s), as in the paper and, on ImageNet, in the
            code. With log C, the weight of uniform logits over 100 classes is 1.9 times as large.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"eakd": weight * EA-KD}``, nats of KD times nats of H(t).
    """
    w = entropy_weights(student_logits, teacher_logits, entropy_temperature, entropy_bound)
    kd = softmax_kl(teacher_logits / temperature, student_logits / temperature)
    return {"eakd": (1.0, w * (weight * temperature**2 * kd))}


def entropy_weights(student: Tensor, teacher: Tensor, temperature: float, bound: float | None) -> Tensor:
    """Returns the weights ``(N,)`` of rows of ``(N, C)`` logits, without gradient; a bound of ``None`` is log C."""
    h_student, h_teacher = (entropy(logits.detach() / temperature) for logits in (student, teacher))
    return h_teacher / 2 * (1 + h_student / (math.log(student.shape[1]) if bound is None else bound))


def entropy(logits: Tensor) -> Tensor:
    """Returns the entropy of the softmax of each row of ``(N, C)`` logits, in nats: ``(N,)``."""
    log_probs = F.log_softmax(logits, -1)
    return -(log_probs.exp() * log_probs).sum(-1)


@register_loss("eakd")
class EAKDLoss(LogitLoss):
    """``ce_weight * CE + weight * EA-KD``; see :func:`eakd_loss`.

    The defaults are those of the paper's code for CIFAR-100. On ImageNet:
    ``temperature=1, weight=0.5, entropy_temperature=2, entropy_bound=None, ce_weight=1``.
    """

    method = "KD, samples weighted by entropy"
    papers = ("2311.13621",)
    function = staticmethod(eakd_loss)

    temperature: Positive = 4.0
    weight: Weight = 0.9
    entropy_temperature: Positive = 3.0
    entropy_bound: Positive | None = 100.0
    _: KW_ONLY
    logit_standardization: bool = False
    ce_weight: Weight = 0.1
