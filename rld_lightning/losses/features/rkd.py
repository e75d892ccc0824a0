"""Relational knowledge distillation (RKD): Park et al., CVPR 2019, arXiv 1904.05068."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import StepContext
from rld_lightning.losses.features.base import FeatureLoss, check_pairs
from rld_lightning.losses.ranges import Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages


@checked
def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: Weight = 25.0,
    angle_weight: Weight = 50.0,
    squared: bool = False,
) -> dict[str, Tensor]:
    """Differences of the distances and of the angles between the samples of a batch, by the smooth L1 loss.

    Distances are divided by their mean over all pairs of different samples (section 3.2.1), angles are the cosines at
    each sample between every two others (section 3.2.2). Both losses are means over all pairs and triplets, those with
    equal members included, as in the published code. An angle with a side of length 0 counts as 0 and has no gradient,
    which would be infinite; a batch of one sample has no relations, and a loss of 0.

    Args:
        student: features ``(B, *)``.
        teacher: features ``(B, *)``, of any other size; never receive a gradient.
        distance_weight: factor on the distances; 0 leaves them out.
        angle_weight: factor on the angles; 0 leaves them out.
        squared: compare squared distances.

    Returns:
        ``{"rkd_distance": distance_weight * distances, "rkd_angle": angle_weight * angles}``.

    Raises:
        ValueError: batch sizes or weights that do not fit.
    """
    check_pairs([student], [teacher])
    ours, theirs = _distances(student), _distances(teacher.detach())
    terms = {}
    if distance_weight:
        distance = F.smooth_l1_loss(_relative(ours, squared), _relative(theirs, squared))
        terms["rkd_distance"] = distance_weight * distance
    if angle_weight:
        terms["rkd_angle"] = angle_weight * F.smooth_l1_loss(_cosines(ours), _cosines(theirs))
    return terms


def _distances(feature: Tensor) -> Tensor:
    """Distances between all samples, ``(B, B)``; those of equal samples are exactly 0, and so is their gradient."""
    feature = feature.flatten(1)
    return torch.cdist(feature, feature, compute_mode="donot_use_mm_for_euclid_dist")


def _relative(distance: Tensor, squared: bool) -> Tensor:
    """Distances, or their squares, over their mean without the diagonal."""
    if squared:
        distance = distance.square()
    size = len(distance)
    # The published code's smallest squared distance, 1e-12.
    distance = distance.clamp(min=1e-12 if squared else 1e-6)
    distance = distance * (1 - torch.eye(size, dtype=distance.dtype, device=distance.device))
    mean = distance.sum() / max(size * (size - 1), 1)
    return distance / mean.clamp(min=1e-12)


def _cosines(distance: Tensor) -> Tensor:
    """Cosines of the angles at sample i between samples j and k, ``(B, B, B)``, by the law of cosines.

    It needs the distances only. The differences that the cosines are defined by would be ``(B, B, D)`` to keep and a
    product of ``D`` terms for each of the ``B^3`` angles.
    """
    # In a shorter side than this the rounding of the longer ones is as large as what would be computed from it.
    shortest = torch.finfo(distance.dtype).eps ** 0.5 * distance.detach().mean()
    inverse = torch.where(distance > shortest, distance, torch.inf).reciprocal()
    square = distance.square()
    cosine = (square.unsqueeze(2) + square.unsqueeze(1) - square) / 2 * (inverse.unsqueeze(2) * inverse.unsqueeze(1))
    return cosine.clamp(-1, 1)


@register_loss("rkd")
class RKDLoss(FeatureLoss):
    """``ce_weight * CE + distance_weight * distances + angle_weight * angles`` of what the classifiers see.

    See :func:`rkd_loss`.
    """

    method = "Relational KD: distances and angles"
    papers = ("1904.05068",)

    single = True
    of_whole_batch = True

    distance_weight: Weight = 25.0
    angle_weight: Weight = 50.0
    squared: bool = False

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """The classifier's input."""
        return (stages.pooled,)

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor], step: StepContext) -> dict[str, Tensor]:
        """``rkd_distance`` and ``rkd_angle``."""
        return rkd_loss(
            student[0],
            teacher[0],
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
            squared=self.squared,
        )
