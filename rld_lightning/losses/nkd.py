"""Normalized knowledge distillation (NKD): Yang et al., ICCV 2023, arXiv 2303.13005."""

from dataclasses import KW_ONLY

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import masked_log_softmax
from rld_lightning.losses.ranges import Positive, Weight
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss


@row_loss
def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    *,
    gamma: Weight = 1.5,
    temperature: Positive = 1.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Computes the soft cross-entropy of the true class, and that within the other classes.

    With teacher logits t, student logits s, label y and temperature T::

        target     = -softmax(t)_y log softmax(s)_y                                   (no temperature)
        non-target = -T^2 sum over k != y of p_k log q_k,  p, q = softmax over k != y of t / T, s / T

    Averaged over the batch. These are cross-entropies, not divergences: the non-target term has the same gradient as
    DKD's NCKD, but exceeds it by the teacher's entropy (times ``T^2``) and does not vanish.

    Args:
        gamma: weight of the non-target term.
        temperature: softmax temperature of the non-target term.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"target": target, "non_target": gamma * non-target}`` in nats.
    """
    index = label.unsqueeze(-1)
    target = -F.softmax(teacher_logits, -1).gather(-1, index) * F.log_softmax(student_logits, -1).gather(-1, index)
    true = torch.zeros_like(teacher_logits, dtype=torch.bool).scatter_(-1, index, True)
    probs = masked_log_softmax(teacher_logits / temperature, true).exp()
    rest = -(probs * masked_log_softmax(student_logits / temperature, true)).sum(-1)
    return {"target": (1.0, target.squeeze(-1)), "non_target": (gamma * temperature**2, rest)}


@register_loss("nkd")
class NKDLoss(LogitLoss):
    """``ce_weight * CE + target + gamma * non-target``; see :func:`nkd_loss`.

    The defaults are the paper's for ImageNet. Its only CIFAR-100 pair (ResNet-34 to ResNet-18) uses
    ``gamma=3.5, temperature=3``.
    """

    method = "Normalized KD"
    papers = ("2303.13005",)
    function = staticmethod(nkd_loss)

    gamma: Weight = 1.5
    temperature: Positive = 1.0
    _: KW_ONLY
    logit_standardization: bool = False
