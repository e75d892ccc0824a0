"""Curriculum temperature for knowledge distillation (CTKD): Li et al., AAAI 2023, arXiv 2211.16231.

The temperature is trained adversarially: it maximises the distillation loss that the student minimises, increasingly
from epoch to epoch. This is the paper's global version, with one temperature for all samples.
"""

import math
from dataclasses import KW_ONLY
from typing import Any

import torch
from torch import Tensor, nn

from rld_lightning.losses.base import DistillationLoss, StepContext
from rld_lightning.losses.divergences import softmax_kl
from rld_lightning.losses.ranges import Count, Positive, Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import Reduction, by_row_blocks, logit_rows


@checked
def ctkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    temperature: Tensor,
    weight: Weight = 1.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> dict[str, Tensor]:
    """Computes :func:`~rld_lightning.losses.kd.kd_loss`, differentiable with respect to the temperature.

    ``T^2 KL( softmax(t / T) || softmax(s / T) )`` of teacher logits t and student logits s, averaged over the batch.
    The gradient reaches T through both distributions and the factor.

    Args:
        temperature: T, a scalar tensor > 0 (not checked, which would synchronise with the device).
        weight: factor on the term.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``{"ctkd": weight * KD}`` in nats.
    """
    if temperature.shape != ():
        raise ValueError(f"temperature must be a scalar tensor, got shape {tuple(temperature.shape)}.")
    rows = logit_rows(
        student_logits, teacher_logits, label, logit_standardization=logit_standardization, ignore_index=ignore_index
    )
    temperature = temperature.to(rows.student)

    def row_losses(both: Tensor) -> tuple[Tensor]:
        student, teacher = both.chunk(2, -1)
        return (softmax_kl(teacher, student),)

    # One tensor, because blocks differentiate only their first argument, and the teacher's half depends on T as well.
    (divergence,) = by_row_blocks(row_losses, torch.cat([rows.student, rows.teacher], -1) / temperature)
    return {"ctkd": weight * temperature.square() * rows.reduce(divergence, reduction)}


class ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by a number: a negative one turns descent into ascent."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        """Returns ``tensor``."""
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Multiplies the gradient by the factor."""
        return ctx.factor * gradient, None


@register_loss("ctkd")
class CTKDLoss(DistillationLoss):
    """``ce_weight * CE + weight * KD`` at a learned temperature; see :func:`ctkd_loss`.

    The temperature is ``lowest_temperature + temperature_range * sigmoid(theta)``. theta is the only parameter; it
    starts at 1 (a temperature of 15.6) and is trained by the student's optimiser, including weight decay. Its gradient
    is multiplied by :meth:`curriculum`. :meth:`statistics` reports the temperature.

    The defaults are those of the paper's code for CIFAR-100. On ImageNet:
    ``curriculum_epochs=5, weight=1, ce_weight=1``.
    """

    method = "Curriculum temperature, one for all samples"
    papers = ("2211.16231",)
    function = staticmethod(ctkd_loss)

    weight: Weight = 0.9
    lowest_temperature: Positive = 1.0
    temperature_range: Positive = 20.0
    curriculum_epochs: Count = 10
    logit_standardization: bool = False
    _: KW_ONLY
    ce_weight: Weight = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.theta = nn.Parameter(torch.ones(()))

    def curriculum(self, epoch: int | None) -> float:
        """Returns the factor on theta's gradient at an epoch counted from 1: a cosine from almost 0 down to -1."""
        progress = 1.0 if epoch is None else min(epoch / self.curriculum_epochs, 1.0)
        return -(1 - math.cos(math.pi * progress)) / 2

    def temperature(self, epoch: int | None = None) -> Tensor:
        """Returns the scalar temperature, with theta's gradient scaled for the epoch."""
        theta = ScaleGradient.apply(self.theta, self.curriculum(epoch))
        return self.lowest_temperature + self.temperature_range * theta.sigmoid()

    def terms(self, step: StepContext) -> dict[str, Tensor]:
        """Returns ``ctkd``."""
        logits = step.student.logits, step.teacher_logits
        return self.call_function(*logits, step.label, temperature=self.temperature(step.epoch))

    def statistics(self, step: StepContext) -> dict[str, Tensor]:
        """Returns ``temperature``."""
        return {"temperature": self.temperature().detach()}
