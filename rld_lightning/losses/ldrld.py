"""Local dense relational logit distillation (LDRLD): Xu et al., ICCV 2025, arXiv 2507.15911.

The student's k highest-ranked classes are compared pairwise, so that the relation of two classes is not affected by
the others.
"""

from dataclasses import KW_ONLY
from typing import Annotated

import torch
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.divergences import softmax_kl
from rld_lightning.losses.numerics import binary_kl
from rld_lightning.losses.ranges import Positive, Weight, whole
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss

Classes = Annotated[int, whole(2, ", because pairs of classes are compared")]


@row_loss
def ldrld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    alpha: Weight,
    beta: Weight,
    k: Classes,
    temperature: Positive,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Compares every pair of the student's top k classes, all k together, and the remaining classes.

    With teacher logits t, student logits s, temperature T and the top classes c_1, ..., c_k in descending order of s,
    averaged over the batch::

        KL(A)     = KL( softmax over A of t / T || softmax over A of s / T )         for a set of classes A
        local     = T^2 [ sum over i < j of w_ij KL({c_i, c_j}) + KL({c_1, ..., c_k}) ] / (k (k - 1) / 2 + 1)
        remaining = T^2 KL( all classes but c_1, ..., c_k )
        w_ij      = 2 exp(-0.05 (i + j)) / (1.5 + |i - j|)

    This follows the published code, which uses the student's ranking and does not treat the true class specially. The
    code subtracts 1000 from the logits of the classes outside a set, which are left out here, and for ``k=2`` uses the
    weight of the pair for the whole set. Otherwise the values agree.

    Args:
        alpha: weight of the local term.
        beta: weight of the remaining term.
        k: number of top classes, at least 2. With k classes or fewer, none remains.
        temperature: softmax temperature of both terms.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"local": alpha * local, "remaining": beta * remaining}`` in nats.
    """
    k = min(k, student_logits.shape[1])
    student, teacher = student_logits / temperature, teacher_logits / temperature
    student_top, classes = student.topk(k, -1)
    teacher_top = teacher.gather(-1, classes)
    # All differences (n, k, k) by broadcasting: indexing the pairs would sum the gradient in a random order.
    pairs = binary_kl(*(x.unsqueeze(-1) - x.unsqueeze(-2) for x in (teacher_top, student_top)))
    local = (pair_weights(student_top) * pairs).sum((-1, -2)) + softmax_kl(teacher_top, student_top)
    top_classes = torch.zeros_like(teacher).scatter_(-1, classes, 1.0)
    remaining = softmax_kl(teacher, student, drop=top_classes)
    return {
        "local": (alpha * temperature**2, local / (k * (k - 1) / 2 + 1)),
        "remaining": (beta * temperature**2, remaining),
    }


def pair_weights(top: Tensor) -> Tensor:
    """Returns the weights w_ij ``(k, k)`` for the top logits ``(n, k)``; 0 on and below the diagonal."""
    rank = torch.arange(1, top.shape[-1] + 1, dtype=top.dtype, device=top.device)
    other = rank.unsqueeze(-1)
    return (2 * torch.exp(-0.05 * (rank + other)) / (1.5 + (rank - other).abs())).triu(1)


@register_loss("ldrld")
class LDRLDLoss(LogitLoss):
    """``ce_weight * CE + alpha * local + beta * remaining``; see :func:`ldrld_loss`.

    The defaults are those of the published code and of its only example (ResNet-32x4 to ResNet-8x4 on CIFAR-100), which
    also warms up the learning rate over 20 epochs (``recipe=ldrld``). The code multiplies the sum by ``ce_weight``
    once more, which makes no difference if it is 1.
    """

    method = "Local dense relational logit distillation"
    papers = ("2507.15911",)
    own_recipe = "ldrld"
    function = staticmethod(ldrld_loss)

    alpha: Weight = 10.5
    beta: Weight = 7.0
    k: Classes = 7
    temperature: Positive = 4.0
    _: KW_ONLY
    logit_standardization: bool = False
