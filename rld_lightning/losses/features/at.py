"""Attention transfer (AT): Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.features.base import FeatureLoss, check_pairs, pool_to_smaller
from rld_lightning.losses.numerics import total
from rld_lightning.losses.ranges import Weight, checked, must_be
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages

# Below 1, the derivative at 0 is infinite, and most of a map is 0 after a ReLU.
Power = Annotated[float, must_be("a finite number >= 1", lambda value: 1 <= value < math.inf)]


@checked
def at_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, weight: Weight = 1000.0, power: Power = 2.0
) -> dict[str, Tensor]:
    """Computes the squared difference of attention maps, mean over batch and positions, summed over the stages.

    The attention of a map is the channel mean of ``|x|^power`` at each position, as a vector of length 1 (section 3.1;
    the paper sums over channels, a factor that the normalisation removes).

    Args:
        student: maps ``(B, channels, H, W)``, shallow to deep.
        teacher: as many maps; if sizes differ, the larger map is average-pooled to the smaller.
        weight: factor on the term.
        power: exponent of the absolute values, at least 1.

    Returns:
        ``{"at": weight * AT}``.

    Raises:
        ValueError: invalid maps or hyper-parameters.
    """
    check_pairs(student, teacher)
    distances = []
    for pair in zip(student, teacher, strict=True):
        ours, theirs = (_attention(feature, power) for feature in pool_to_smaller(*pair))
        distances.append((ours - theirs.detach()).square().mean())
    return {"at": weight * total(distances)}


def _attention(feature: Tensor, power: float) -> Tensor:
    energy = feature.square() if power == 2 else feature.abs().pow(power)  # ``square`` needs half the passes
    return F.normalize(energy.mean(1).flatten(1))


@register_loss("at")
class ATLoss(FeatureLoss):
    """``ce_weight * CE + weight * AT`` on all stages but the stem; see :func:`at_loss`.

    If one network has more stages than the other (the pairs wrn40_2 to MobileNetV2, ResNet50 to MobileNetV1), its
    deepest ones are not compared, as in the published code.
    """

    method = "Attention transfer"
    papers = ("1612.03928",)
    function = staticmethod(at_loss)

    maps = True
    from_shallow = True

    weight: Weight = 1000.0
    power: Power = 2.0

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the stages without the stem."""
        return stages.features[1:]
