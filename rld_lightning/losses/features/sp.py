"""Similarity-preserving distillation (SP): Tung and Mori, ICCV 2019, arXiv 1907.09682."""

from torch import Tensor

from rld_lightning.losses.features.base import FeatureLoss, check_pairs, unit_vectors
from rld_lightning.losses.ranges import Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages


@checked
def sp_loss(student: Tensor, teacher: Tensor, *, weight: Weight = 3000.0) -> dict[str, Tensor]:
    """Computes the squared difference of both networks' similarities of a batch's images, summed, divided by ``B^2``.

    The similarities ``(B, B)`` are the inner products of the flattened features, each row normalised to length 1
    (section 3). A sample whose features are all 0 has similarity 0 to all, including itself.

    Args:
        student: features ``(B, *)``.
        teacher: features ``(B, *)``, of any size; never receive a gradient.
        weight: factor on the term.

    Returns:
        ``{"sp": weight * SP}``.

    Raises:
        ValueError: invalid batch sizes or weight.
    """
    check_pairs([student], [teacher])
    return {"sp": weight * (_similarities(student) - _similarities(teacher.detach())).square().mean()}


def _similarities(feature: Tensor) -> Tensor:
    feature = feature.flatten(1)
    return unit_vectors(feature @ feature.mT)


@register_loss("sp")
class SPLoss(FeatureLoss):
    """``ce_weight * CE + weight * SP`` on the last stage; see :func:`sp_loss`."""

    method = "Similarity-preserving distillation"
    papers = ("1907.09682",)
    function = staticmethod(sp_loss)

    single = True
    of_whole_batch = True

    weight: Weight = 3000.0

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the last stage."""
        return stages.features[-1:]
