"""Multi-level logit distillation (MLKD) with a single view: Jin et al., CVPR 2023.

The paper distils two views of each image, the second strongly augmented (:mod:`rld_lightning.losses.mlkd`). This is
the single-view variant of RLD's public code (arXiv 2408.07703), to which RLD is compared.
"""

from dataclasses import KW_ONLY
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.divergences import softmax_kl
from rld_lightning.losses.numerics import margin, standardize, total
from rld_lightning.losses.ranges import Positive, Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import by_row_blocks, logit_rows

OTHER_TEMPERATURES = (3.0, 5.0, 2.0, 6.0)


@checked
def mlkd_noaug_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    temperature: Positive = 4.0,
    weight: Weight = 0.9,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Literal["mean"] = "mean",
) -> dict[str, Tensor]:
    """Computes KD, class correlation and batch correlation, each at five temperatures.

    With teacher logits t, student logits s, ``P = softmax(t / T)`` and ``Q = softmax(s / T)``, both ``B x C``, summed
    over the temperatures T (``temperature``, 3, 5, 2, 6; duplicates count twice)::

        KD                = f * T^2 KL( P || Q )                   averaged over the batch
        batch correlation = f * || P P' - Q Q' ||^2 / B
        class correlation = g * || P' P - Q' Q ||^2 / C

    f is the fraction of samples whose largest teacher probability is at most the batch's median. g is the fraction of
    classes whose teacher probability, summed over the batch, is at most the median over the classes. The paper intends
    to exclude the other samples and classes, but its code masks sums that are already reduced, so the masks only scale
    the terms. This follows the code, because the published numbers come from it. Medians are computed in log space,
    which distinguishes probabilities that all round to 1.

    Each position of ``(B, C, *)`` logits is a sample; memory grows with the square of the number of samples.

    Args:
        temperature: the first of the five.
        weight: factor on all terms.
        logit_standardization: z-score both logits for KD (LSKD, arXiv 2403.01427), not for the correlations.
        reduction: only the mean, because the terms are values of the whole batch.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``kd`` (in nats), ``class_correlation`` and ``batch_correlation``, weighted scalars.
    """
    options: dict[str, Any] = {"ignore_index": ignore_index, "temperature": temperature}
    student, teacher, valid = logit_rows(student_logits, teacher_logits, label, **options).zeroed()
    temperatures = (temperature, *OTHER_TEMPERATURES)
    (kd,) = divergences(student, teacher, logit_standardization, temperatures)
    terms = one_view(kd, student, teacher, valid, temperatures)
    return {name: weight * term for name, term in terms.items()}


def divergences(
    student: Tensor, teacher: Tensor, logit_standardization: bool, *groups: tuple[float, ...]
) -> tuple[Tensor, ...]:
    """Returns ``T^2 KL( softmax(t / T) || softmax(s / T) )`` of each row ``(N,)``, summed per group of temperatures."""

    def row_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        if logit_standardization:
            student, teacher = standardize(student), standardize(teacher)
        return tuple(total(T**2 * softmax_kl(teacher / T, student / T) for T in group) for group in groups)

    return by_row_blocks(row_losses, student, teacher)


def one_view(
    kd: Tensor,
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    temperatures: tuple[float, ...],
    *,
    exclude_sure: bool = False,
) -> dict[str, Tensor]:
    """Returns the three terms of one view, unweighted, from its :func:`divergences` and ``LogitRows.zeroed``.

    Args:
        temperatures: temperatures of the correlations.
        exclude_sure: whether to exclude confident samples and classes, as the paper intends; otherwise the terms are
            multiplied by the fractions f and g of the unsure ones, as in its code.
    """
    samples, classes = (mask.to(student.dtype) for mask in unsure(teacher, valid))
    valid = valid.to(student.dtype)
    f: Tensor | float = 1.0
    g: Tensor | float = 1.0
    if not exclude_sure:
        f, g = samples.sum() / valid.sum().clamp(min=1), classes.mean()
        samples, classes = valid, torch.ones_like(classes)
    class_mask, sample_mask = valid.unsqueeze(-1) * classes, samples.unsqueeze(-1)
    class_correlation = batch_correlation = student.new_zeros(())
    for T in temperatures:
        p, q = (F.softmax(logits / T, -1) for logits in (teacher, student))
        class_correlation = class_correlation + _gram_distance((class_mask * p).T, (class_mask * q).T)
        batch_correlation = batch_correlation + _gram_distance(sample_mask * p, sample_mask * q)
    num_samples = samples.sum().clamp(min=1)
    return {
        "kd": f * (samples * kd).sum() / num_samples,
        "class_correlation": g * class_correlation / classes.sum(),
        "batch_correlation": f * batch_correlation / num_samples,
    }


def _gram_distance(p: Tensor, q: Tensor) -> Tensor:
    return (p @ p.T - q @ q.T).square().sum()


def unsure(teacher: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the samples and classes whose teacher confidence is at most the median: ``(N,)`` and ``(C,)`` bool.

    Ignored samples (``valid``, ``(N,)`` bool, is False) are not among them.
    """
    confidence = margin(teacher, teacher.argmax(-1)).masked_fill(~valid, torch.nan)
    log_class_sum = F.log_softmax(teacher, -1).masked_fill(~valid.unsqueeze(-1), -torch.inf).logsumexp(0)
    return confidence <= confidence.nanmedian(), log_class_sum <= log_class_sum.median()


@register_loss("mlkd_noaug")
class MLKDNoAugLoss(LogitLoss):
    """``ce_weight * CE + weight * (KD + class correlation + batch correlation)``; see :func:`mlkd_noaug_loss`.

    The defaults are those of the public code for CIFAR-100. On ImageNet: ``temperature=1, weight=0.5, ce_weight=0.5``.
    """

    method = "Multi-level logit distillation, one view"
    papers = ("CVPR 2023",)
    of_whole_batch = True
    function = staticmethod(mlkd_noaug_loss)

    temperature: Positive = 4.0
    weight: Weight = 0.9
    logit_standardization: bool = False
    _: KW_ONLY
    ce_weight: Weight = 0.1
