"""Entropy-based adaptive knowledge distillation on DKD (EA-DKD): Su et al., ICCV 2025, arXiv 2311.13621."""

from dataclasses import KW_ONLY

from torch import Tensor

from rld_lightning.losses.base import Epochs, LogitLoss
from rld_lightning.losses.dkd import decoupled_kl
from rld_lightning.losses.eakd import entropy_weights
from rld_lightning.losses.ranges import Positive, Weight
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, row_loss


@row_loss
def eadkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    *,
    alpha: Weight,
    beta: Weight,
    temperature: Positive,
    entropy_temperature: Positive = 3.0,
    entropy_bound: Positive | None = 100.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Computes :func:`~rld_lightning.losses.dkd.dkd_loss`, weighted as :func:`~rld_lightning.losses.eakd.eakd_loss`.

    Args:
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: softmax temperature of both terms.
        entropy_temperature: see ``eakd_loss``; the published code does not pass its setting on, so it is 3 on ImageNet
            as well.
        entropy_bound: see ``eakd_loss``.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"tckd": alpha * w TCKD, "nckd": beta * w NCKD}``, nats of DKD times nats of H(t).
    """
    w = entropy_weights(student_logits, teacher_logits, entropy_temperature, entropy_bound)
    tckd, nckd = decoupled_kl(teacher_logits / temperature, student_logits / temperature, label)
    return {"tckd": (1.0, w * (alpha * temperature**2 * tckd)), "nckd": (1.0, w * (beta * temperature**2 * nckd))}


@register_loss("eadkd")
class EADKDLoss(LogitLoss):
    """``ce_weight * CE + warmup * w (alpha * TCKD + beta * NCKD)``; see :func:`eadkd_loss`.

    The defaults are those of the paper's code for CIFAR-100. On ImageNet:
    ``beta=0.5, temperature=1, entropy_bound=None, warmup_epochs=1``.
    """

    method = "DKD, samples weighted by entropy"
    papers = ("2311.13621",)
    function = staticmethod(eadkd_loss)

    alpha: Weight = 1.0
    beta: Weight = 8.0
    temperature: Positive = 4.0
    entropy_temperature: Positive = 3.0
    entropy_bound: Positive | None = 100.0
    _: KW_ONLY
    logit_standardization: bool = False
    warmup_epochs: Epochs = 20
