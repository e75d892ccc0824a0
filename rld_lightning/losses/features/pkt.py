"""Probabilistic knowledge transfer (PKT): Passalis and Tefas, ECCV 2018, arXiv 1803.10837."""

import torch
from torch import Tensor

from rld_lightning.losses.features.base import FeatureLoss, check_pairs
from rld_lightning.losses.ranges import Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages

EPS = 1e-7


@checked
def pkt_loss(student: Tensor, teacher: Tensor, *, weight: Weight = 30000.0) -> dict[str, Tensor]:
    """Computes the divergence of the probabilities that each sample of a batch selects the others as neighbours.

    The probabilities are the cosines of the features, mapped to [0, 1] and divided by their sum over a row
    (section 3)::

        mean over both i and j of p_ij log((p_ij + 1e-7) / (q_ij + 1e-7)),  p of the teacher, q of the student

    This follows the published code: it includes the diagonal, which the paper's sum excludes, and the mean is over all
    ``B^2`` entries. A sample whose features are all 0 has cosines of 0 and receives no gradient.

    Args:
        student: features ``(B, *)``.
        teacher: features ``(B, *)``, of any size; never receive a gradient.
        weight: factor on the term.

    Returns:
        ``{"pkt": weight * PKT}``.

    Raises:
        ValueError: invalid batch sizes or weight.
    """
    check_pairs([student], [teacher])
    q, p = _neighbour_probs(student), _neighbour_probs(teacher.detach())
    return {"pkt": weight * (p * ((p + EPS).log() - (q + EPS).log())).mean()}


def _neighbour_probs(feature: Tensor) -> Tensor:
    feature = feature.flatten(1)
    length = feature.norm(dim=1, keepdim=True)
    # With only EPS in the denominator, a sample of zeros would have a gradient of 1e7.
    unit = feature / (length + EPS).masked_fill(length == 0, torch.inf)
    # Rounding can make the cosine of opposite features < -1, for which the logarithm is undefined.
    similarity = (unit @ unit.mT + 1).clamp(min=0)
    return similarity / similarity.sum(1, keepdim=True)


@register_loss("pkt")
class PKTLoss(FeatureLoss):
    """``ce_weight * CE + weight * PKT`` on the classifiers' inputs; see :func:`pkt_loss`."""

    method = "Probabilistic knowledge transfer"
    papers = ("1803.10837",)
    function = staticmethod(pkt_loss)

    single = True
    of_whole_batch = True

    weight: Weight = 30000.0

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the classifier's input."""
        return (stages.pooled,)
