"""Multi-level logit distillation (MLKD) with a single view: Jin et al., CVPR 2023.

The paper distils two views of each image, the second strongly augmented; that is :mod:`rld_lightning.losses.mlkd`. This
is the variant with one view that RLD (arXiv 2408.07703) is compared to, as its public code has it.
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
    """Samples, relations of classes and relations of samples, each at five temperatures.

    With teacher logits t, student logits s, ``P = softmax(t / T)`` and ``Q = softmax(s / T)``, both ``B x C``, summed
    over the temperatures T (``temperature``, 3, 5, 2, 6; one that is there twice counts twice)::

        KD                = f * T^2 KL( P || Q )                   averaged over the batch
        batch correlation = f * || P P' - Q Q' ||^2 / B
        class correlation = g * || P' P - Q' Q ||^2 / C

    f is the fraction of samples whose largest teacher probability is at most the batch's median, g that of classes
    whose teacher probability, summed over the batch, is at most the median of the classes. The paper means to leave
    the other samples and classes out; its code multiplies sums that are already taken, so that both only scale, and
    that is followed because the published numbers come from it. Medians are found in log space: probabilities that
    all round to 1 are still told apart.

    Of ``(B, C, *)`` logits every place is a sample, and the memory grows with the square of their number.

    Args:
        temperature: the first of the five.
        weight: factor on all terms.
        logit_standardization: z-score both logits for KD (LSKD, arXiv 2403.01427); the correlations keep raw logits.
        reduction: the mean only, because the terms belong to the whole batch.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``kd`` (in nats), ``class_correlation`` and ``batch_correlation``, scalars with the weight on.
    """
    options: dict[str, Any] = {"ignore_index": ignore_index, "temperature": temperature}
    student, teacher, valid = logit_rows(student_logits, teacher_logits, label, **options).zeroed()
    temperatures = (temperature, *OTHER_TEMPERATURES)
    (divergence,) = divergences(student, teacher, logit_standardization, temperatures)
    terms = one_view(divergence, student, teacher, valid, temperatures)
    return {name: weight * term for name, term in terms.items()}


def divergences(
    student: Tensor, teacher: Tensor, logit_standardization: bool, *groups: tuple[float, ...]
) -> tuple[Tensor, ...]:
    """``T^2 KL( softmax(t / T) || softmax(s / T) )`` of each row ``(N,)``, summed over each group of temperatures."""

    def row_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        if logit_standardization:
            student, teacher = standardize(student), standardize(teacher)
        return tuple(total(T**2 * softmax_kl(teacher / T, student / T) for T in group) for group in groups)

    return by_row_blocks(row_losses, student, teacher)


def one_view(
    divergence: Tensor,
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    temperatures: tuple[float, ...],
    *,
    leave_out: bool = False,
) -> dict[str, Tensor]:
    """The three terms of one view, without weight, from its :func:`divergences` and ``LogitRows.zeroed``.

    Args:
        temperatures: of the correlations.
        leave_out: whether samples and classes of high confidence are left out, as the paper means it, or scale the
            whole term by the fraction of the others, as its code does.
    """
    samples, classes = (kept.to(student.dtype) for kept in unsure(teacher, valid))
    valid = valid.to(student.dtype)
    kept_samples: Tensor | float = 1.0
    kept_classes: Tensor | float = 1.0
    if not leave_out:
        kept_samples, kept_classes = samples.sum() / valid.sum().clamp(min=1), classes.mean()
        samples, classes = valid, torch.ones_like(classes)
    of_class, of_sample = valid.unsqueeze(-1) * classes, samples.unsqueeze(-1)
    class_correlation = batch_correlation = student.new_zeros(())
    for T in temperatures:
        p, q = (F.softmax(logits / T, -1) for logits in (teacher, student))
        class_correlation = class_correlation + _gram_distance((of_class * p).T, (of_class * q).T)
        batch_correlation = batch_correlation + _gram_distance(of_sample * p, of_sample * q)
    size = samples.sum().clamp(min=1)
    return {
        "kd": kept_samples * (samples * divergence).sum() / size,
        "class_correlation": kept_classes * class_correlation / classes.sum(),
        "batch_correlation": kept_samples * batch_correlation / size,
    }


def _gram_distance(p: Tensor, q: Tensor) -> Tensor:
    return (p @ p.T - q @ q.T).square().sum()


def unsure(teacher: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Samples and classes in which the teacher's confidence is at most the median: ``(N,)`` and ``(C,)`` bool.

    Samples that do not count (``valid``, ``(N,)`` bool) are not among them.
    """
    confidence = margin(teacher, teacher.argmax(-1)).masked_fill(~valid, torch.nan)
    of_class = F.log_softmax(teacher, -1).masked_fill(~valid.unsqueeze(-1), -torch.inf).logsumexp(0)
    return confidence <= confidence.nanmedian(), of_class <= of_class.median()


@register_loss("mlkd_noaug")
class MLKDNoAugLoss(LogitLoss):
    """``ce_weight * CE + weight * (KD + class correlation + batch correlation)``; see :func:`mlkd_noaug_loss`.

    Defaults are those of CIFAR-100 in the public code. On ImageNet: ``temperature=1, weight=0.5, ce_weight=0.5``.
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
