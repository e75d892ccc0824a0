"""Knowledge distillation (KD): Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531."""

from dataclasses import KW_ONLY

from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.divergences import softmax_kl
from rld_lightning.losses.ranges import Positive, Weight
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss


@row_loss
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    temperature: Positive,
    weight: Weight = 1.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Computes ``T^2 KL( softmax(t / T) || softmax(s / T) )`` of teacher logits t and student logits s, batch mean.

    Args:
        temperature: T, the softmax temperature of both networks.
        weight: factor on the term.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"kd": weight * KD}`` in nats.
    """
    return {"kd": (weight * temperature**2, softmax_kl(teacher_logits / temperature, student_logits / temperature))}


@register_loss("kd")
class KDLoss(LogitLoss):
    """``ce_weight * CE + weight * KD``; see :func:`kd_loss`.

    The defaults are those of mdistiller for CIFAR-100. On ImageNet: ``temperature=1, weight=0.5`` and
    ``ce_weight=1`` (ResNet-34 to ResNet-18) or ``0.5`` (ResNet-50 to MobileNetV1).
    """

    method = "Knowledge distillation"
    papers = ("1503.02531",)
    function = staticmethod(kd_loss)

    temperature: Positive = 4.0
    weight: Weight = 0.9
    logit_standardization: bool = False
    _: KW_ONLY
    ce_weight: Weight = 0.1
