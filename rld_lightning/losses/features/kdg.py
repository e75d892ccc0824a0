"""KD by approximation (KD-G), feature members and the sum with the logit member: Hsu et al., arXiv 2203.10163.

A reconstruction; :mod:`rld_lightning.losses.kdg` explains the family. The paper's ranking of knowledge sources: logits,
then gradient-weighted features, then plain features.
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
    """Computes the squared difference of features, weighted by the teacher's classifier, averaged over the batch.

    With the difference of the features d, the weight of the teacher's classifier W and its probabilities p at
    temperature T::

        identity  1/2 |d|^2                                                             (KD-feat-L2)
        gradient  1/2 sum_k w_k d_k^2,  w_k = E over y ~ p of (d log p_y / d feature_k)^2     (KD-feat-G)
        fisher    1/2 d' W' (diag(p) - p p') W d = 1/2 Var_p(W d)                       (KD-feat-F)

    The gradients are ``W_y - p W``, so w_k is the variance of column k of W under p: the diagonal of the Fisher form.
    The Fisher form approximates ``T^2`` times the KL divergence at T between the teacher's output and its classifier's
    output for the student's feature.

    Args:
        student: ``(B, D)``, float32 or float64.
        teacher: ``(B, D)``; never receives a gradient.
        teacher_logits: ``(B, C)``; not needed for the identity.
        classifier: ``(C, D)``, the teacher's W; not needed for the identity.
        weighting: ``"gradient"``, ``"fisher"`` or ``"identity"``.
        temperature: T; not used by the identity.
        weight: factor on the term.

    Returns:
        ``{"kdg_feature": weight * loss}``.

    Raises:
        ValueError: invalid shapes or hyper-parameters.
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
        # E[x^2] - E[x]^2, because the centred form would need (B, C, D) memory; it can be rounded below 0.
        variance = (probs @ classifier.square() - (probs @ classifier).square()).clamp(min=0)
        loss = (variance * difference.square()).sum(-1) / 2
    return {"kdg_feature": weight * loss.mean()}


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


@register_loss("kdg")
class KDGLoss(FeatureLoss):
    """``ce_weight * CE + logit_weight * logit member + feature_weight * feature member``.

    See :func:`~rld_lightning.losses.kdg.kdg_logit_loss` (in its Fisher form) and :func:`kdg_feature_loss`. The features
    are the pooled ones. If the student's width differs, a linear layer, trained with the student, maps its feature to
    the teacher's width (our choice). The paper's weights and temperatures are not known to us: the logit member has
    those of plain KD, and the feature member a weight that makes it about as large on CIFAR-100.

    Args:
        logit_weight: factor on the logit member; 0 disables it.
        feature_weight: factor on the feature member. About 1 suits ``"gradient"`` and ``"fisher"``; ``"identity"`` sums
            over all elements of the feature and needs about 0.01.
        weighting: weighting of the features: ``"gradient"``, ``"fisher"`` or ``"identity"``.
        temperature: temperature of the teacher's probabilities in both members.
        others: see :class:`~rld_lightning.losses.features.base.FeatureLoss`.
    """

    method = "KD-G: logits and weighted features (reconstruction)"
    papers = ("2203.10163",)

    single = True

    own_buffers = ("classifier",)  # a constant, equal on all processes

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
        """Returns the pooled feature."""
        return (stages.pooled,)

    def connect(
        self, student: nn.Module, teacher: nn.Module | None, image_shape: Sequence[int], train_label: Tensor
    ) -> None:
        """Connects as in the base class, and copies the weight of the teacher's classifier if it is needed."""
        super().connect(student, teacher, image_shape, train_label)
        assert teacher is not None
        if self.weighting != "identity":
            self.classifier = classifier_of(teacher).weight.detach().clone()

    def build(self, student_shapes: Sequence[torch.Size], teacher_shapes: Sequence[torch.Size]) -> None:
        """Builds the linear layer from the student's width to the teacher's, if they differ."""
        ours, theirs = student_shapes[0][1:].numel(), teacher_shapes[0][1:].numel()
        self.mapping = nn.Identity() if ours == theirs else nn.Linear(ours, theirs)

    def align(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Flattens the features and maps the student's to the teacher's width."""
        return [self.mapping(student[0].flatten(1))], [teacher[0].flatten(1)]

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor], step: StepContext) -> dict[str, Tensor]:
        """Returns ``kdg_logit`` (unless its weight is 0) and ``kdg_feature``."""
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
