"""Neuron selectivity transfer (NST): Huang and Wang, 2017, arXiv 1707.01219."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.features.base import FeatureLoss, check_pairs, pool_to_smaller
from rld_lightning.losses.numerics import total
from rld_lightning.losses.ranges import Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages


@checked
def nst_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], *, weight: Weight = 50.0) -> dict[str, Tensor]:
    """Computes the maximum mean discrepancy of both networks' channels, mean over the batch, summed over the stages.

    Each channel of a map is a sample: a vector over the positions, normalised to length 1. With the paper's polynomial
    kernel ``k(x, y) = (x . y)^2``, the squared discrepancy of a stage is::

        mean k(t, t') + mean k(s, s') - 2 mean k(s, t)    over all pairs of channels

    Args:
        student: maps ``(B, channels, H, W)``, shallow to deep.
        teacher: as many maps; if sizes differ, the larger map is average-pooled to the smaller.
        weight: factor on the term.

    Returns:
        ``{"nst": weight * NST}``.

    Raises:
        ValueError: invalid maps or weight.
    """
    check_pairs(student, teacher)
    distances = []
    for pair in zip(student, teacher, strict=True):
        ours, theirs = (F.normalize(feature.flatten(2), dim=2) for feature in pool_to_smaller(*pair))
        distances.append(_discrepancy(ours, theirs.detach()))
    return {"nst": weight * total(distances)}


def _discrepancy(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the squared discrepancy of two sets of channels ``(B, channels, positions)``, mean over the batch."""
    if student.shape[2] <= min(student.shape[1], teacher.shape[1]):
        # k is the inner product of x x^T and y y^T: the discrepancy is the distance of two (positions, positions)
        # matrices.
        ours, theirs = (feature.mT @ feature / feature.shape[1] for feature in (student, teacher))
        return (ours - theirs).square().sum((1, 2)).mean()
    own = _mean_kernel(teacher, teacher) + _mean_kernel(student, student)
    return own - 2 * _mean_kernel(student, teacher)


def _mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT).square().mean()


@register_loss("nst")
class NSTLoss(FeatureLoss):
    """``ce_weight * CE + weight * NST`` on all stages but the stem; see :func:`nst_loss`.

    If one network has more stages than the other (the pairs wrn40_2 to MobileNetV2, ResNet50 to MobileNetV1), its
    deepest ones are not compared, as in the published code.
    """

    method = "Neuron selectivity transfer"
    papers = ("1707.01219",)
    function = staticmethod(nst_loss)

    maps = True
    from_shallow = True

    weight: Weight = 50.0

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the stages without the stem."""
        return stages.features[1:]
