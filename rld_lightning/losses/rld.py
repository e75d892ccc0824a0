"""Refined Logit Distillation (RLD).

Sun et al., "Knowledge Distillation with Refined Logits", ICCV 2025, arXiv 2408.07703.

A teacher that is wrong about a sample misleads the student, and editing its logits destroys what it knows about the
classes. RLD passes on two views of the teacher that the label makes harmless: how confident it was (whatever class
that was about), and how it ranks the classes that it rightly put below the true one.
"""

import torch
from torch import Tensor

from rld_lightning.losses.base import LogitLoss, StepContext
from rld_lightning.losses.numerics import (
    binary_kl,
    by_row_blocks,
    check_positive,
    check_weights,
    kl_rows,
    logit_rows,
    margin,
    masked_log_softmax,
)
from rld_lightning.losses.registry import register_loss

MASKS = ("ge", "g")


def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    confidence_temperature: float | None = None,
    logit_standardization: bool = False,
    mask: str = "ge",
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """Sample-confidence distillation (SCD) and masked-correlation distillation (MCD).

    With teacher logits t, student logits s, label y, temperatures T (``temperature``) and Tc
    (``confidence_temperature``), averaged over the batch::

        SCD = Tc^2 KL( [b, 1 - b] || [q, 1 - q] ),  b = max_k softmax(t / Tc)_k,  q = softmax(s / Tc)_y
        MCD = T^2 KL( softmax over k not in M of t / T || softmax over k not in M of s / T ),  M = {k : t_k >= t_y}

    A sample that has no class, or a single one, outside M adds exactly 0 to MCD, value and gradient, and still counts
    in the average.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        label: ``(B,)`` or ``(B, *)`` class indices.
        alpha: weight of SCD.
        beta: weight of MCD.
        temperature: softmax temperature of MCD.
        confidence_temperature: softmax temperature of SCD; ``None`` takes ``temperature``, as in the paper's
            recommended setting ("same T"). The published code's default is 1.
        logit_standardization: z-score both logits first (LSKD, arXiv 2403.01427).
        mask: ``"ge"`` removes every class whose teacher logit is >= the true class's, the true class included (the
            paper's choice, M_ge); ``"g"`` removes only those strictly above it (its ablation, M_g).
        ignore_index: label of samples that count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (then each term is ``(B, *)``).

    Returns:
        ``{"scd": alpha * SCD, "mcd": beta * MCD}`` in nats.

    Raises:
        ValueError: shapes, class counts, labels or hyper-parameters that do not fit.
    """
    if confidence_temperature is None:
        confidence_temperature = temperature
    check_positive(temperature=temperature, confidence_temperature=confidence_temperature)
    check_weights(alpha=alpha, beta=beta)
    _check_mask(mask)
    rows = logit_rows(
        student_logits,
        teacher_logits,
        label,
        ignore_index=ignore_index,
        reduction=reduction,
        logit_standardization=logit_standardization,
    )

    def row_losses(student: Tensor, teacher: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        drop = dropped_classes(teacher, label, mask)
        top = teacher.argmax(-1)
        cold_student, cold_teacher = student / confidence_temperature, teacher / confidence_temperature
        confidence = binary_kl(margin(cold_teacher, top), margin(cold_student, label))
        if confidence_temperature == temperature:
            student, teacher = cold_student, cold_teacher
        else:
            student, teacher = student / temperature, teacher / temperature
        correlation = kl_rows(masked_log_softmax(teacher, drop), masked_log_softmax(student, drop))
        return confidence, correlation

    confidence, correlation = by_row_blocks(row_losses, rows.student, rows.teacher, rows.label)
    return {
        "scd": alpha * confidence_temperature**2 * rows.reduce(confidence, reduction),
        "mcd": beta * temperature**2 * rows.reduce(correlation, reduction),
    }


def dropped_classes(teacher: Tensor, label: Tensor, mask: str) -> Tensor:
    """The set M of each row of ``(N, C)`` teacher logits, ``(N, C)`` bool: the classes that MCD leaves out."""
    true = teacher.gather(-1, label.unsqueeze(-1))
    return teacher >= true if mask == "ge" else teacher > true


def _check_mask(mask: str) -> None:
    if mask not in MASKS:
        raise ValueError(f"mask={mask!r} is unknown; choose 'ge' (the paper's) or 'g' (its ablation).")


@register_loss("rld")
class RLDLoss(LogitLoss):
    """``ce_weight * CE + warmup * (alpha * SCD + beta * MCD)``; see :func:`rld_loss`.

    Defaults are those of CIFAR-100 in the paper's code, but for the confidence temperature, which equals the
    temperature. On ImageNet: ``beta=0.5`` (ResNet-34 to ResNet-18) or ``2.0`` (ResNet-50 to MobileNetV1),
    ``temperature=1``, ``warmup_epochs=1``.
    """

    method = "Refined Logit Distillation"
    papers = ("2408.07703",)

    function = staticmethod(rld_loss)

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        confidence_temperature: float | None = None,
        logit_standardization: bool = False,
        mask: str = "ge",
        *,
        ce_weight: float = 1.0,
        warmup_epochs: int = 20,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(ce_weight=ce_weight, warmup_epochs=warmup_epochs, ignore_index=ignore_index)
        check_weights(alpha=alpha, beta=beta)
        check_positive(temperature=temperature)
        if confidence_temperature is not None:
            check_positive(confidence_temperature=confidence_temperature)
        _check_mask(mask)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.confidence_temperature = confidence_temperature
        self.logit_standardization = logit_standardization
        self.mask = mask

    def statistics(self, step: StepContext) -> dict[str, Tensor]:
        """What the refinement did to this batch, in percent.

        ``teacher_wrong``: samples whose largest teacher logit is not the true class's. ``masked_classes``: classes
        left out of MCD, mean over samples.
        """
        rows = logit_rows(step.student.logits.detach(), step.teacher.logits, step.label, ignore_index=self.ignore_index)
        dtype = torch.float32
        wrong = rows.reduce((rows.teacher.argmax(-1) != rows.label).to(dtype), "mean")
        masked = rows.reduce(dropped_classes(rows.teacher, rows.label, self.mask).to(dtype).mean(-1), "mean")
        return {"teacher_wrong": 100 * wrong, "masked_classes": 100 * masked}

    def refined(self, teacher: Tensor, label: Tensor) -> Tensor:
        """What MCD passes on: the teacher without the classes that it ranks at or above the true one."""
        return teacher.masked_fill(dropped_classes(teacher, label, self.mask), -torch.inf)
