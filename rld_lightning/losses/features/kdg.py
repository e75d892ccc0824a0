"""KD by approximation (KD-G), feature members and the sum with the logit member: Hsu et al., arXiv 2203.10163.

The family is explained in :mod:`rld_lightning.losses.kdg`, and is a reconstruction as said there. The paper ranks what
can be distilled: logits before gradient-weighted features before plain features.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.losses.base import StepContext
from rld_lightning.losses.features.base import FeatureLoss
from rld_lightning.losses.kdg import half_variance, kdg_logit_loss
from rld_lightning.losses.ranges import Positive, Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages, classifier_of

Weighting = Literal["gradient", "fisher", "identity"]


@checked
def kdg_feature_loss(
    student: Tensor,
    teacher: Tensor,
    teacher_logits: Tensor | None = None,
    classifier: Tensor | None = None,
    *,
    weighting: Weighting = "gradient",
    temperature: Positive = 1.0,
    weight: Weight = 1.0,
) -> dict[str, Tensor]:
    """Squared difference of features as the teacher's classifier weighs it, averaged over the batch.

    With d the difference of the features, W the teacher's classifier and p its probabilities at temperature T::

        identity  1/2 |d|^2                                                             (KD-feat-L2)
        gradient  1/2 sum_k w_k d_k^2,  w_k = E over y ~ p of (d log p_y / d feature_k)^2     (KD-feat-G)
        fisher    1/2 d' W' (diag(p) - p p') W d = 1/2 Var_p(W d)                       (KD-feat-F)

    The gradients are ``W_y - p W``, so that w_k is the variance of column k of W under p, the diagonal of the Fisher
    form. The last approximates ``T^2`` times the divergence at T between the teacher and its classifier on the
    student's feature.

    Args:
        student: ``(B, D)``, float32 or float64.
        teacher: ``(B, D)``; never receives a gradient.
        teacher_logits: ``(B, C)``; not needed for the identity.
        classifier: ``(C, D)``, the teacher's W; not needed for the identity.
        weighting: ``"gradient"``, ``"fisher"`` or ``"identity"``.
        temperature: T; the identity does not use it.
        weight: factor on the term.

    Returns:
        ``{"kdg_feature": weight * loss}``.

    Raises:
        ValueError: shapes or hyper-parameters that do not fit.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"features must be of one shape (B, D), got student {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)}."
        )
    difference = student - teacher.detach()
    if weighting == "identity":
        return {"kdg_feature": weight * difference.square().sum(-1).mean() / 2}
    if teacher_logits is None or classifier is None or classifier.shape != (teacher_logits.shape[1], teacher.shape[1]):
        raise ValueError(
            f"weighting={weighting!r} needs the teacher's logits (B, C) and the weight (C, D) of its classifier on "
            f"features (B, D), got {_shape(teacher_logits)}, {_shape(classifier)} and {_shape(teacher)}."
        )
    probs = F.softmax(teacher_logits.detach().to(student.dtype) / temperature, -1)
    classifier = classifier.detach().to(student.dtype)
    if weighting == "fisher":
        loss = half_variance(difference @ classifier.T, probs)
    else:
        # Of two products, because the variance written out would take (B, C, D); hence the rounding below 0.
        variance = (probs @ classifier.square() - (probs @ classifier).square()).clamp(min=0)
        loss = (variance * difference.square()).sum(-1) / 2
    return {"kdg_feature": weight * loss.mean()}


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


@register_loss("kdg")
class KDGLoss(FeatureLoss):
    """``ce_weight * CE + logit_weight * logit member + feature_weight * feature member``.

    See :func:`~rld_lightning.losses.kdg.kdg_logit_loss` (in its Fisher form) and :func:`kdg_feature_loss`. Features are
    the pooled ones. Where the student's have another width, a linear layer trained with the student maps them to the
    teacher's (our choice). The paper's weights and temperatures are not known to us: those of the logits are plain
    KD's, that of the features makes their member about as large on CIFAR-100.

    Args:
        logit_weight: factor on the logit member; 0 leaves it out.
        feature_weight: factor on the feature member. Of the size of 1 suits ``"gradient"`` and ``"fisher"``; the
            identity sums over as many numbers as the feature has and wants 0.01 or so.
        weighting: of the features: ``"gradient"``, ``"fisher"`` or ``"identity"``.
        temperature: of the teacher's probabilities in both members.
        others: see :class:`~rld_lightning.losses.features.base.FeatureLoss`.
    """

    method = "KD-G: logits and weighted features (reconstruction)"
    papers = ("2203.10163",)

    single = True

    own_buffers = ("classifier",)  # a constant, the same wherever the teacher is

    logit_weight: Weight = 0.9
    feature_weight: Weight = 1.0
    weighting: Weighting = "gradient"
    temperature: Positive = 4.0
    _: KW_ONLY
    ce_weight: Weight = 0.1
    classifier: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.register_buffer("classifier", None, persistent=False)

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """The pooled feature."""
        return (stages.pooled,)

    def connect(
        self, student: nn.Module, teacher: nn.Module | None, image_shape: Sequence[int], train_label: Tensor
    ) -> None:
        """As :meth:`FeatureLoss.connect`; copies the weight of the teacher's classifier where it is needed."""
        super().connect(student, teacher, image_shape, train_label)
        assert teacher is not None
        if self.weighting != "identity":
            self.classifier = classifier_of(teacher).weight.detach().clone()

    def build(self, student_shapes: Sequence[torch.Size], teacher_shapes: Sequence[torch.Size]) -> None:
        """Maps the student's width to the teacher's, where they differ."""
        ours, theirs = student_shapes[0][1:].numel(), teacher_shapes[0][1:].numel()
        self.mapping = nn.Identity() if ours == theirs else nn.Linear(ours, theirs)

    def align(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Flattens what has height and width, and maps the student's."""
        return [self.mapping(student[0].flatten(1))], [teacher[0].flatten(1)]

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor], step: StepContext) -> dict[str, Tensor]:
        """``kdg_logit`` (where it has a weight) and ``kdg_feature``."""
        logits = {}
        if self.logit_weight:
            logits = kdg_logit_loss(
                step.student.logits, step.teacher_logits, temperature=self.temperature, weight=self.logit_weight
            )
        return logits | kdg_feature_loss(
            student[0],
            teacher[0],
            step.teacher_logits,
            self.classifier,
            weighting=self.weighting,
            temperature=self.temperature,
            weight=self.feature_weight,
        )
