"""SimKD, the teacher's classifier reused: Chen et al., CVPR 2022, arXiv 2203.14001."""

from collections.abc import Sequence
from dataclasses import KW_ONLY

import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.losses.base import StepContext
from rld_lightning.losses.features.base import FeatureLoss, check_pairs, pool_to_smaller
from rld_lightning.losses.ranges import Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.graft import GraftedStudent
from rld_lightning.models.stages import Stages
from rld_lightning.models.taps import unwrap


@checked
def simkd_loss(student: Tensor, teacher: Tensor, *, weight: Weight = 1.0) -> dict[str, Tensor]:
    """Squared difference of the maps that both networks classify the average of, mean over all elements.

    Args:
        student: the projected map ``(B, channels, H, W)``.
        teacher: the last map, with as many channels; of two sizes, the larger is average-pooled to the smaller. (In the
            published code the student's is pooled before its projector, see
            :class:`~rld_lightning.models.graft.GraftedStudent`.)
        weight: factor on the term.

    Returns:
        ``{"simkd": weight * SimKD}``.

    Raises:
        ValueError: maps or a weight that do not fit.
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

    The student is made by :func:`~rld_lightning.models.graft`, in a training run by the run itself; ShuffleV2 and
    MobileNetV2 lose their last 1x1 convolution, as published. By default there is no cross-entropy, as published:
    labels are not looked at.
    """

    method = "The student ends in the teacher's classifier"
    papers = ("2203.14001",)

    single = True

    reuses_classifier = True

    weight: Weight = 1.0
    _: KW_ONLY
    ce_weight: Weight = 0.0

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """The map before the average; the projector's output in a grafted student."""
        return (stages.last_map,)

    def connect(
        self, student: nn.Module, teacher: nn.Module | None, image_shape: Sequence[int], train_label: Tensor
    ) -> None:
        """Chooses the maps.

        Raises:
            ValueError: the student is not a grafted one, or the teacher does not classify the average of a map.
        """
        if not isinstance(unwrap(student), GraftedStudent):
            raise ValueError(
                f"{type(self).__name__} trains a student that ends in the teacher's classifier, and "
                f"{type(unwrap(student)).__name__} does not: student = graft(student, teacher)."
            )
        super().connect(student, teacher, image_shape, train_label)

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor], step: StepContext) -> dict[str, Tensor]:
        """``simkd``."""
        return simkd_loss(student[0], teacher[0], weight=self.weight)
