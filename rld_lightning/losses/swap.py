"""Distillation from swapped teacher logits: if the teacher is wrong, two of its logits are swapped.

A method that RLD (arXiv 2408.07703) is compared to; called LA in the paper and SWAP in its public code. Wen et al.,
"Preparing Lessons: Improve Knowledge Distillation with Better Supervision", arXiv 1911.07471, use the same swap as
"knowledge adjustment".
"""

from dataclasses import KW_ONLY

from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.divergences import softmax_kl
from rld_lightning.losses.ranges import Positive, Weight
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss


@row_loss
def swap_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    *,
    temperature: Positive,
    weight: Weight = 1.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Computes ``T^2 KL( softmax(t' / T) || softmax(s / T) )``, averaged over the batch.

    t' are the teacher's logits with the largest one (the first of several) and the true class's swapped, so that the
    true class's is the largest; if the teacher is right, nothing changes. It makes no difference whether logits are
    standardized before or after the swap.

    Args:
        temperature: T, the softmax temperature of both networks.
        weight: factor on the term.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"swap": weight * SWAP}`` in nats.
    """
    teacher = swap_logits(teacher_logits, label)
    return {"swap": (weight * temperature**2, softmax_kl(teacher / temperature, student_logits / temperature))}


def swap_logits(teacher: Tensor, label: Tensor) -> Tensor:
    """Returns ``(N, C)`` logits with each row's largest and its true class's logit swapped."""
    true, top = label.unsqueeze(-1), teacher.argmax(-1, keepdim=True)
    return teacher.scatter(-1, top, teacher.gather(-1, true)).scatter(-1, true, teacher.gather(-1, top))


@register_loss("swap")
class SwapLoss(LogitLoss):
    """``ce_weight * CE + weight * SWAP``; see :func:`swap_loss`.

    The defaults are those of RLD's public code for CIFAR-100, which adds no cross-entropy (``ce_weight=0``). On
    ImageNet: ``temperature=1``.
    """

    method = "KD, the teacher's largest logit and the true class's exchanged (LA)"
    papers = ("1911.07471",)
    function = staticmethod(swap_loss)

    temperature: Positive = 4.0
    weight: Weight = 1.0
    logit_standardization: bool = False
    _: KW_ONLY
    ce_weight: Weight = 0.0

    def refined(self, teacher: Tensor, label: Tensor) -> Tensor:
        """Returns the teacher's logits with the largest and the true class's swapped."""
        return swap_logits(teacher, label)
