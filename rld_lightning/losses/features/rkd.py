"""Relational knowledge distillation (RKD): Park et al., CVPR 2019, arXiv 1904.05068."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.features.base import FeatureLoss, check_pairs
from rld_lightning.losses.ranges import Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages
from rld_lightning.mps import where_it_runs


@checked
def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: Weight = 25.0,
    angle_weight: Weight = 50.0,
    squared: bool = False,
) -> dict[str, Tensor]:
    """Computes the smooth L1 losses of the distances and of the angles between the samples of a batch.

    Distances are divided by their mean over all pairs of different samples (section 3.2.1); angles are the cosines at
    each sample between every two others (section 3.2.2). The losses are means over all pairs and triplets, including
    those with equal members, as in the published code. The cosine of an angle with a side of length 0 is set to 0,
    without gradient (which would be infinite). The loss of a batch of one sample is 0.

    Args:
        student: features ``(B, *)``.
        teacher: features ``(B, *)``, of any size; never receive a gradient.
        distance_weight: factor on the distances; 0 disables them.
        angle_weight: factor on the angles; 0 disables them.
        squared: compare squared distances.

    Returns:
        ``{"rkd_distance": distance_weight * distances, "rkd_angle": angle_weight * angles}``.

    Raises:
        ValueError: invalid batch sizes or weights.
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
    """Returns the distances between all samples, ``(B, B)``; for equal samples exactly 0, with gradient 0."""
    values = where_it_runs("_cdist_backward", feature.flatten(1))
    return torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").to(feature.device)


def _relative(distance: Tensor, squared: bool) -> Tensor:
    """Divides distances, or their squares, by their mean without the diagonal."""
    if squared:
        distance = distance.square()
    size = len(distance)
    # The published code clamps squared distances to at least 1e-12.
    distance = distance.clamp(min=1e-12 if squared else 1e-6)
    distance = distance * (1 - torch.eye(size, dtype=distance.dtype, device=distance.device))
    mean = distance.sum() / max(size * (size - 1), 1)
    return distance / mean.clamp(min=1e-12)


def _cosines(distance: Tensor) -> Tensor:
    """Returns the cosines of the angles at sample i between samples j and k, ``(B, B, B)``, by the law of cosines.

    It needs only the distances. The definition by difference vectors would store ``(B, B, D)`` differences and compute
    a product of ``D`` terms for each of the ``B^3`` angles.
    """
    # If a side is shorter than this, the rounding error of the longer ones dominates the cosine.
    shortest = torch.finfo(distance.dtype).eps ** 0.5 * distance.detach().mean()
    inverse = torch.where(distance > shortest, distance, torch.inf).reciprocal()
    square = distance.square()
    cosine = (square.unsqueeze(2) + square.unsqueeze(1) - square) / 2 * (inverse.unsqueeze(2) * inverse.unsqueeze(1))
    return cosine.clamp(-1, 1)


@register_loss("rkd")
class RKDLoss(FeatureLoss):
    """``ce_weight * CE + distance_weight * distances + angle_weight * angles`` on the classifiers' inputs.

    See :func:`rkd_loss`.
    """

    method = "Relational KD: distances and angles"
    papers = ("1904.05068",)
    function = staticmethod(rkd_loss)

    single = True
    of_whole_batch = True

    distance_weight: Weight = 25.0
    angle_weight: Weight = 50.0
    squared: bool = False

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the classifier's input."""
        return (stages.pooled,)
