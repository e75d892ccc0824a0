"""SimKD, which reuses the teacher's classifier: Chen et al., CVPR 2022, arXiv 2203.14001."""

from collections.abc import Sequence
from dataclasses import KW_ONLY

import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.losses.features.base import FeatureLoss, check_pairs, pool_to_smaller
from rld_lightning.losses.ranges import Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.graft import GraftedStudent
from rld_lightning.models.stages import Stages
from rld_lightning.models.taps import unwrap


@checked
def simkd_loss(student: Tensor, teacher: Tensor, *, weight: Weight = 1.0) -> dict[str, Tensor]:
    """Computes the squared difference of the maps before global pooling, mean over all elements.

    Args:
        student: the projected map ``(B, channels, H, W)``.
        teacher: the last map, with as many channels; if sizes differ, the larger map is average-pooled to the smaller.
            (The published code pools the student's map before its projector, see
            :class:`~rld_lightning.models.graft.GraftedStudent`.)
        weight: factor on the term.

    Returns:
        ``{"simkd": weight * SimKD}``.

    Raises:
        ValueError: invalid maps or weight.
    """
    check_pairs([student], [teacher])
    ours, theirs = pool_to_smaller(student, teacher)
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(
            f"the student's map has {ours.shape[1]} channels and the teacher's {theirs.shape[1]}; the student's must "
            "be projected to the teacher's width: student = graft(student, teacher)."
        )
    return {"simkd": weight * F.mse_loss(ours, theirs.detach())}


@register_loss("simkd")
class SimKDLoss(FeatureLoss):
    """``ce_weight * CE + weight * SimKD`` of a student that ends in the teacher's classifier; see :func:`simkd_loss`.

    Create the student with :func:`~rld_lightning.models.graft`; a training run does so itself. As published, ShuffleV2
    and MobileNetV2 lose their last 1x1 convolution, and there is no cross-entropy by default: labels are not used.
    """

    method = "The student ends in the teacher's classifier"
    papers = ("2203.14001",)
    function = staticmethod(simkd_loss)

    single = True

    reuses_classifier = True

    weight: Weight = 1.0
    _: KW_ONLY
    ce_weight: Weight = 0.0

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the map before global pooling: in a grafted student, the projector's output."""
        return (stages.last_map,)

    def connect(
        self, student: nn.Module, teacher: nn.Module | None, image_shape: Sequence[int], train_label: Tensor
    ) -> None:
        """Chooses the maps.

        Raises:
            ValueError: the student is not grafted, or the teacher does not classify an average-pooled map.
        """
        if not isinstance(unwrap(student), GraftedStudent):
            raise ValueError(
                f"{type(self).__name__} trains a student that ends in the teacher's classifier, and "
                f"{type(unwrap(student)).__name__} does not: student = graft(student, teacher)."
            )
        super().connect(student, teacher, image_shape, train_label)
