"""Variational information distillation (VID): Ahn et al., CVPR 2019, arXiv 1904.05835."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.losses.base import StepContext
from rld_lightning.losses.features.base import FeatureLoss, check_pairs, pool_to_smaller
from rld_lightning.losses.numerics import total
from rld_lightning.losses.ranges import Weight, checked, must_be
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages

# Added to every variance, so that the loss of a perfectly predicted channel is finite.
EPS = 1e-5

Variance = Annotated[float, must_be(f"a finite number > {EPS}", lambda value: EPS < value < math.inf)]


@checked
def vid_loss(
    mean: Sequence[Tensor], teacher: Sequence[Tensor], variance: Sequence[Tensor], *, weight: Weight = 1.0
) -> dict[str, Tensor]:
    """Computes the negative log-likelihood of the teacher's maps under predicted Gaussians, summed over the stages.

    For each stage, with the predicted mean m and a variance v per channel, without the constant::

        mean over batch, channels and positions of ((t - m)^2 / v + log v) / 2

    Args:
        mean: predictions of the teacher's maps, ``(B, channels, H, W)`` each.
        teacher: the teacher's maps, of the same shapes; never receive a gradient.
        variance: ``(channels,)`` of each stage, > 0.
        weight: factor on the term.

    Returns:
        ``{"vid": weight * VID}`` in nats per element; negative if the predictions are good.

    Raises:
        ValueError: invalid shapes or weight.
    """
    check_pairs(mean, teacher)
    stages = []
    for predicted, observed, spread in zip(mean, teacher, variance, strict=True):
        if predicted.shape != observed.shape:
            raise ValueError(
                f"a prediction {tuple(predicted.shape)} and the teacher's map {tuple(observed.shape)} must have the "
                "same shape."
            )
        # Averaged over batch and positions first, so that the rest is computed on one number per channel.
        error = (observed.detach() - predicted).square().mean((0, 2, 3))
        stages.append((error / spread + spread.log()).mean() / 2)
    return {"vid": weight * total(stages)}


@register_loss("vid")
class VIDLoss(FeatureLoss):
    """``ce_weight * CE + weight * VID`` on all stages but the stem; see :func:`vid_loss`.

    For each stage, a regressor (three 1x1 convolutions without bias, with ReLUs between) predicts the mean from the
    student's map, after the larger map is average-pooled to the other's size. The variance is
    ``softplus(log_scale) + 1e-5``, with a learned number for each of the teacher's channels. Both are trained, as in
    the paper and in RepDistiller; mdistiller does not register the variances, so they keep their initial value.

    If one network has more stages than the other, its deepest ones are not compared, as in the published code.

    Args:
        init_variance: initial variance.
        others: see :class:`~rld_lightning.losses.features.base.FeatureLoss`.
    """

    method = "Variational information distillation"
    papers = ("1904.05835",)

    maps = True
    from_shallow = True

    weight: Weight = 1.0
    init_variance: Variance = 5.0

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the stages without the stem."""
        return stages.features[1:]

    def build(self, student_shapes: Sequence[torch.Size], teacher_shapes: Sequence[torch.Size]) -> None:
        """Builds the regressors and the parameters of the variances."""
        pairs = [(student[1], teacher[1]) for student, teacher in zip(student_shapes, teacher_shapes, strict=True)]
        self.regressors = nn.ModuleList(_regressor(*channels) for channels in pairs)
        softplus = self.init_variance - EPS
        log_scale = softplus + math.log(-math.expm1(-softplus))
        self.log_scales = nn.ParameterList(torch.full((theirs,), log_scale) for _, theirs in pairs)

    def variances(self) -> list[Tensor]:
        """Returns the variances of each stage, ``(channels,)`` each."""
        return [F.softplus(log_scale) + EPS for log_scale in self.log_scales]

    def align(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Pools both maps to one size and applies the regressors to the student's."""
        pooled = [pool_to_smaller(*pair) for pair in zip(student, teacher, strict=True)]
        mean = [regressor(ours) for regressor, (ours, _) in zip(self.regressors, pooled, strict=True)]
        return mean, [theirs for _, theirs in pooled]

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor], step: StepContext) -> dict[str, Tensor]:
        """Returns ``vid``."""
        return vid_loss(student, teacher, self.variances(), weight=self.weight)


def _regressor(student: int, teacher: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(student, teacher, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(teacher, teacher, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(teacher, teacher, 1, bias=False),
    )
