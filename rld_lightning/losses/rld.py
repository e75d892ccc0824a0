"""Refined Logit Distillation (RLD).

Sun et al., "Knowledge Distillation with Refined Logits", ICCV 2025, arXiv 2408.07703.

A teacher that misclassifies a sample misleads the student, and editing its logits destroys its knowledge of how the
classes relate. RLD distils two parts of the teacher's output that are safe given the label: its confidence (the largest
probability, whichever class has it) and its relations among the classes that it ranks below the true class.
"""

from dataclasses import KW_ONLY
from typing import Annotated, Literal

import torch
from torch import Tensor

from rld_lightning.losses.base import Epochs, LogitLoss, StepContext
from rld_lightning.losses.divergences import float_mask, largest_margin, margin_kl, softmax_kl
from rld_lightning.losses.ranges import Positive, Weight, choose
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, flat_rows, row_loss

Mask = Annotated[Literal["ge", "g"], choose("'ge' (the paper's) or 'g' (its ablation)", "ge", "g")]
ABOVE = {"ge": torch.ge, "g": torch.gt}


@row_loss
def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    *,
    alpha: Weight = 1.0,
    beta: Weight = 8.0,
    temperature: Positive = 4.0,
    confidence_temperature: Positive | None = None,
    logit_standardization: bool = False,
    mask: Mask = "ge",
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> RowTerms:
    """Computes sample confidence distillation (SCD) and masked correlation distillation (MCD).

    With teacher logits t, student logits s, label y, temperatures T (``temperature``) and Tc
    (``confidence_temperature``), averaged over the batch::

        SCD = Tc^2 KL( [b, 1 - b] || [q, 1 - q] ),  b = max_k softmax(t / Tc)_k,  q = softmax(s / Tc)_y
        MCD = T^2 KL( softmax over k not in M of t / T || softmax over k not in M of s / T ),  M = {k : t_k >= t_y}

    If fewer than two classes of a sample are outside M, its MCD and the gradient are exactly 0; the sample still counts
    in the average. If Tc = T, M is M_ge and the teacher ranks the true class alone first in every sample, this is DKD.

    Args:
        alpha: weight of SCD.
        beta: weight of MCD.
        temperature: softmax temperature of MCD.
        confidence_temperature: softmax temperature of SCD; ``None`` uses ``temperature``, like the only example in the
            public code's README (``--same-t``). The code's default is 1. The paper does not state which of the two its
            tables use.
        mask: ``"ge"`` masks every class whose teacher logit is >= the true class's, including the true class (the
            paper's choice, M_ge); ``"g"`` masks only the classes strictly above it (the paper's ablation, M_g).
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"scd": alpha * SCD, "mcd": beta * MCD}`` in nats.
    """
    scd_temperature = temperature if confidence_temperature is None else confidence_temperature
    student, teacher = student_logits / scd_temperature, teacher_logits / scd_temperature
    scd = margin_kl(largest_margin(teacher), student, label)  # from the log-odds of b, and the logits of q
    if scd_temperature != temperature:
        student, teacher = student_logits / temperature, teacher_logits / temperature
    true_logit = teacher_logits.gather(-1, label.unsqueeze(-1))
    in_m = float_mask(ABOVE[mask], teacher_logits, true_logit)
    mcd = softmax_kl(teacher, student, drop=in_m)
    return {"scd": (alpha * scd_temperature**2, scd), "mcd": (beta * temperature**2, mcd)}


def masked_classes(teacher: Tensor, label: Tensor, mask: Mask) -> Tensor:
    """Returns the set M of each row of ``(N, C)`` teacher logits, ``(N, C)`` bool: the classes that MCD excludes."""
    true_logit = teacher.gather(-1, label.unsqueeze(-1))
    return ABOVE[mask](teacher, true_logit)


@register_loss("rld")
class RLDLoss(LogitLoss):
    """``ce_weight * CE + warmup * (alpha * SCD + beta * MCD)``; see :func:`rld_loss`.

    The defaults are those of the public code for CIFAR-100, except that the confidence temperature equals the
    temperature. The weights that the paper used for each pair are not published; its figure 7 shows that the best ones
    vary strongly between pairs. On ImageNet: ``beta=0.5`` (ResNet-34 to ResNet-18) or ``2.0`` (ResNet-50 to
    MobileNetV1), ``temperature=1``, ``warmup_epochs=1``.
    """

    method = "Refined Logit Distillation"
    papers = ("2408.07703",)
    function = staticmethod(rld_loss)

    alpha: Weight = 1.0
    beta: Weight = 8.0
    temperature: Positive = 4.0
    confidence_temperature: Positive | None = None
    logit_standardization: bool = False
    mask: Mask = "ge"
    _: KW_ONLY
    warmup_epochs: Epochs = 20

    def statistics(self, step: StepContext) -> dict[str, Tensor]:
        """Returns the effect of the refinement on this batch, in percent.

        ``teacher_wrong``: samples whose largest teacher logit is not the true class's. ``masked_classes``: classes that
        MCD excludes, mean over samples.
        """
        rows = flat_rows(step.student.logits, step.teacher_logits, step.label, self.ignore_index)
        assert rows.label is not None
        wrong = rows.teacher.argmax(-1) != rows.label
        masked = masked_classes(rows.teacher, rows.label, self.mask).mean(-1, dtype=torch.float32)
        wrong, masked = (100 * rows.reduce(torch.stack([wrong, masked]))).unbind()
        return {"teacher_wrong": wrong, "masked_classes": masked}

    def refined(self, teacher: Tensor, label: Tensor) -> Tensor:
        """Returns the logits that MCD distils: the teacher's, with the masked classes at -inf."""
        return teacher.masked_fill(masked_classes(teacher, label, self.mask), -torch.inf)
