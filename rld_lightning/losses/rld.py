"""Refined Logit Distillation (RLD).

Sun et al., "Knowledge Distillation with Refined Logits", ICCV 2025, arXiv 2408.07703.

A teacher that is wrong about a sample misleads the student, and editing its logits destroys what it knows about the
classes. RLD passes on two views of the teacher that the label makes harmless: how confident it was (whatever class
that was about), and how it ranks the classes that it rightly put below the true one.
"""

from dataclasses import KW_ONLY
from typing import Annotated, Literal

import torch
from torch import Tensor

from rld_lightning.losses.base import Epochs, LogitLoss, StepContext
from rld_lightning.losses.divergences import largest_margin, margin_kl, marks, softmax_kl
from rld_lightning.losses.ranges import Positive, Weight, choose
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, RowTerms, logit_rows, row_loss

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
    """Sample-confidence distillation (SCD) and masked-correlation distillation (MCD).

    With teacher logits t, student logits s, label y, temperatures T (``temperature``) and Tc
    (``confidence_temperature``), averaged over the batch::

        SCD = Tc^2 KL( [b, 1 - b] || [q, 1 - q] ),  b = max_k softmax(t / Tc)_k,  q = softmax(s / Tc)_y
        MCD = T^2 KL( softmax over k not in M of t / T || softmax over k not in M of s / T ),  M = {k : t_k >= t_y}

    A sample that has no class, or a single one, outside M adds exactly 0 to MCD, value and gradient, and still counts
    in the average.

    Args:
        alpha: weight of SCD.
        beta: weight of MCD.
        temperature: softmax temperature of MCD.
        confidence_temperature: softmax temperature of SCD; ``None`` takes ``temperature``, as the one example in the
            public code's README does (``--same-t``). Without that flag it is 1 there; which of the two the paper's
            tables used is not said.
        mask: ``"ge"`` removes every class whose teacher logit is >= the true class's, the true class included (the
            paper's choice, M_ge); ``"g"`` removes only those strictly above it (its ablation, M_g).
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"scd": alpha * SCD, "mcd": beta * MCD}`` in nats.
    """
    cold = temperature if confidence_temperature is None else confidence_temperature
    student, teacher = student_logits / cold, teacher_logits / cold
    confidence = margin_kl(largest_margin(teacher), student, label)
    if cold != temperature:
        student, teacher = student_logits / temperature, teacher_logits / temperature
    true = teacher_logits.gather(-1, label.unsqueeze(-1))
    correlation = softmax_kl(teacher, student, drop=marks(ABOVE[mask], teacher_logits, true))
    return {"scd": (alpha * cold**2, confidence), "mcd": (beta * temperature**2, correlation)}


def dropped_classes(teacher: Tensor, label: Tensor, mask: Mask) -> Tensor:
    """The set M of each row of ``(N, C)`` teacher logits, ``(N, C)`` bool: the classes that MCD leaves out."""
    true = teacher.gather(-1, label.unsqueeze(-1))
    return ABOVE[mask](teacher, true)


@register_loss("rld")
class RLDLoss(LogitLoss):
    """``ce_weight * CE + warmup * (alpha * SCD + beta * MCD)``; see :func:`rld_loss`.

    Defaults are those of the public code for CIFAR-100, except for the confidence temperature, which equals the
    temperature. The paper's weights for each pair are not published; by its figure 7 the best ones vary
    much between pairs. On ImageNet: ``beta=0.5`` (ResNet-34 to ResNet-18) or ``2.0`` (ResNet-50 to MobileNetV1),
    ``temperature=1``, ``warmup_epochs=1``.
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
        """Effect of the refinement on this batch, in percent.

        ``teacher_wrong``: samples whose largest teacher logit is not the true class's. ``masked_classes``: classes
        left out of MCD, mean over samples.
        """
        rows = logit_rows(step.student.logits.detach(), step.teacher_logits, step.label, ignore_index=self.ignore_index)
        assert rows.label is not None
        wrong = rows.reduce((rows.teacher.argmax(-1) != rows.label).to(torch.float32))
        masked = rows.reduce(dropped_classes(rows.teacher, rows.label, self.mask).to(torch.float32).mean(-1))
        return {"teacher_wrong": 100 * wrong, "masked_classes": 100 * masked}

    def refined(self, teacher: Tensor, label: Tensor) -> Tensor:
        """What MCD distils: the teacher without the classes that it ranks at or above the true one."""
        return teacher.masked_fill(dropped_classes(teacher, label, self.mask), -torch.inf)
