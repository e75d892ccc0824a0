"""Entropy-based adaptive knowledge distillation (EA-KD): Su et al., ICCV 2025, arXiv 2311.13621.

Another method's loss of each sample counts the more the less sure the teacher and the student are: KD's here, DKD's in
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
    """:func:`~rld_lightning.losses.kd.kd_loss`, each sample weighted by entropies, averaged over the batch.

    With H the entropy of softmax(. / entropy_temperature) of the teacher logits t and the student logits s::

        EA-KD = w T^2 KL( softmax(t / T) || softmax(s / T) ),   w = H(t) / 2 (1 + H(s) / entropy_bound)

    w carries no gradient, and its mean over the batch is not 1.

    Args:
        temperature: T, the softmax temperature of KD.
        weight: factor on the term.
        entropy_temperature: softmax temperature of the entropies.
        entropy_bound: what H(s) is compared to: 100, as in the published code on all data but ImageNet, which almost
            switches the student's part off; or ``None`` for its upper bound log C, as in the paper and, on ImageNet, in
            the code. Of logits without a preference among 100 classes the weight is 1.9 times as large with log C.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"eakd": weight * EA-KD}``, nats of KD times nats of H(t).
    """
    factor = entropy_weights(student_logits, teacher_logits, entropy_temperature, entropy_bound)
    kd = softmax_kl(teacher_logits / temperature, student_logits / temperature)
    return {"eakd": (1.0, factor * (weight * temperature**2 * kd))}


def entropy_weights(student: Tensor, teacher: Tensor, temperature: float, bound: float | None) -> Tensor:
    """``(N,)`` weights of the samples of ``(N, C)`` logits, without gradient; a bound of ``None`` is log C."""
    of_student, of_teacher = (entropy(logits.detach() / temperature) for logits in (student, teacher))
    return of_teacher / 2 * (1 + of_student / (math.log(student.shape[1]) if bound is None else bound))


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax of each row of ``(N, C)`` logits, in nats: ``(N,)``."""
    log_probs = F.log_softmax(logits, -1)
    return -(log_probs.exp() * log_probs).sum(-1)


@register_loss("eakd")
class EAKDLoss(LogitLoss):
    """``ce_weight * CE + weight * EA-KD``; see :func:`eakd_loss`.

    Defaults are those of CIFAR-100 in the paper's code. On ImageNet:
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
