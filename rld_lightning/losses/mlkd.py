"""Multi-level logit distillation (MLKD) with two views: Jin et al., CVPR 2023.

The variant with a single view is :mod:`rld_lightning.losses.mlkd_noaug`.
"""

from dataclasses import KW_ONLY
from typing import Any, Literal

from torch import Tensor

from rld_lightning.losses.base import DistillationLoss, StepContext
from rld_lightning.losses.mlkd_noaug import OTHER_TEMPERATURES, divergences, one_view
from rld_lightning.losses.ranges import Positive, Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import logit_rows

Mode = Literal["reference", "clean"]


@checked
def mlkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_strong: Tensor,
    teacher_strong: Tensor,
    label: Tensor | None = None,
    *,
    temperature: Positive = 4.0,
    weight: Weight = 0.9,
    mode: Mode = "reference",
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Literal["mean"] = "mean",
) -> dict[str, Tensor]:
    """Computes KD of both views, class correlation and batch correlation, each at five temperatures.

    With teacher logits t, student logits s, ``P = softmax(t / T)`` and ``Q = softmax(s / T)``, both ``B x C``, of the
    weak view unless marked as strong, summed over the temperatures T (``temperature``, 3, 5, 2, 6)::

        KD                = T^2 KL( P || Q )            averaged over the unsure samples
        strong KD         = T^2 KL( P || Q ), strong    averaged over the batch
        class correlation = || P' P - Q' Q ||^2 / n     among the n unsure classes
        batch correlation = || P P' - Q Q' ||^2 / m     among the m unsure samples

    A sample is unsure if its largest teacher probability is at most the batch's median. A class is unsure if its
    teacher probability, summed over the batch, is at most the median over the classes. This is ``mode="clean"``.

    The published code differs in three ways; ``mode="reference"`` follows it, because the published numbers come from
    it. It computes the weak view's terms over all samples or classes and multiplies them by the fraction of unsure
    ones, which halves them. Its strong KD uses the weak view at the temperatures 2 and 6. It also computes correlations
    of the strong view but never adds them; both modes omit them.

    Each position of ``(B, C, *)`` logits is a sample; memory grows with the square of the number of samples.

    Args:
        student_logits: the student's logits of the weak view.
        teacher_logits: the teacher's logits of the weak view.
        student_strong: the student's logits of the strong view, the same shape.
        teacher_strong: the teacher's logits of the strong view; never receives a gradient.
        temperature: the first of the five.
        weight: factor on all terms.
        mode: ``"reference"`` or ``"clean"``.
        logit_standardization: z-score all logits for both KD terms (LSKD, arXiv 2403.01427), not for the correlations.
        reduction: only the mean, because the terms are values of the whole batch.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``kd`` and ``kd_strong`` (in nats), ``class_correlation`` and ``batch_correlation``, weighted scalars.
    """
    if student_strong.shape != student_logits.shape:
        raise ValueError(
            f"student_strong {tuple(student_strong.shape)} must have the shape of student_logits "
            f"{tuple(student_logits.shape)}: both are views of the same images."
        )
    options: dict[str, Any] = {"ignore_index": ignore_index, "temperature": temperature}
    student, teacher, valid = logit_rows(student_logits, teacher_logits, label, **options).zeroed()
    strong = logit_rows(student_strong, teacher_strong, label, **options).zeroed()[:2]

    first, others = (temperature, *OTHER_TEMPERATURES[:2]), OTHER_TEMPERATURES[2:]
    if mode == "reference":
        kd_first, kd_others = divergences(student, teacher, logit_standardization, first, others)
        (kd_strong,) = divergences(*strong, logit_standardization, first)
        kd, kd_strong = kd_first + kd_others, kd_strong + kd_others
    else:
        (kd,) = divergences(student, teacher, logit_standardization, (*first, *others))
        (kd_strong,) = divergences(*strong, logit_standardization, (*first, *others))
    terms = one_view(kd, student, teacher, valid, (*first, *others), exclude_sure=mode == "clean")
    # Ignored samples are zeros in both networks, so their divergence is 0.
    terms["kd_strong"] = kd_strong.sum() / valid.sum().clamp(min=1)
    return {name: weight * term for name, term in terms.items()}


@register_loss("mlkd")
class MLKDLoss(DistillationLoss):
    """``ce_weight * (CE + strong CE) + weight * (KD + strong KD + class correlation + batch correlation)``.

    See :func:`mlkd_loss`. The cross-entropy of the strong view is the term ``ce_strong``; a warm-up, which the method
    does not use, would scale it like the method's other terms. The loss reads both views from a :class:`StepContext`
    and cannot be called with two tensors of logits.

    The defaults are those of the public code for CIFAR-100, which trains for 480 epochs or more with an initial
    learning rate of 0.025 (0.01 for mobile students). On ImageNet: ``temperature=1, weight=0.5, ce_weight=0.5``, with
    the usual number of epochs.
    """

    method = "Multi-level logit distillation, two views"
    papers = ("CVPR 2023",)
    function = staticmethod(mlkd_loss)
    own_recipe = "mlkd"
    needs_strong_view = True
    of_whole_batch = True

    temperature: Positive = 4.0
    weight: Weight = 0.9
    mode: Mode = "reference"
    logit_standardization: bool = False
    _: KW_ONLY
    ce_weight: Weight = 0.1

    def terms(self, step: StepContext) -> dict[str, Tensor]:
        """Returns the terms of :func:`mlkd_loss`, and the strong view's cross-entropy unless ``ce_weight`` is 0.

        Raises:
            ValueError: the step has no strong view, or :func:`mlkd_loss` raises it.
        """
        if step.student_strong is None or step.teacher_strong is None:
            raise ValueError(
                "MLKDLoss needs a second, strongly augmented view of each image: give the data module strong_view=True "
                "and the StepContext student_strong and teacher_strong, or use MLKDNoAugLoss."
            )
        strong = step.student_strong.logits, step.teacher_strong.logits
        terms = self.call_function(step.student.logits, step.teacher_logits, *strong, step.label)
        if self.ce_weight:
            terms["ce_strong"] = self.ce_weight * self.cross_entropy(step.student_strong.logits, step.label)
        return terms
