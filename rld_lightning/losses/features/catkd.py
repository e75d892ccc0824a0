"""Class attention transfer (CAT-KD): Guo et al., CVPR 2023, arXiv 2304.12777."""

from collections.abc import Sequence
from dataclasses import field

import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.losses.base import StepContext
from rld_lightning.losses.features.base import FeatureLoss, check_pairs, pool_to_smaller, unit_vectors
from rld_lightning.losses.ranges import Count, Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.hold_outside import hold_outside
from rld_lightning.models.stages import Stages, classifier_of


@checked
def catkd_loss(
    student: Tensor,
    teacher: Tensor,
    student_classifier: Tensor,
    teacher_classifier: Tensor,
    *,
    weight: Weight = 400.0,
    pool_size: Count = 2,
    normalize: bool = True,
) -> dict[str, Tensor]:
    """Computes the squared difference of class activation maps, mean over samples, classes and positions.

    A class activation map is the classifier's output for that class at each position, without the bias: a 1x1
    convolution of the last map. The map is pooled first, which gives the same result at lower cost: both are linear.

    The paper normalises each map to length 1; its published configs do so only for networks of different families, with
    other weights. Its code removes the classifier's bias from both networks; here they keep it, but the maps omit it.

    Args:
        student: the student's last map ``(B, channels, H, W)``.
        teacher: the teacher's last map, of any size and number of channels.
        student_classifier: weight ``(C, channels)`` of the student's classifier; receives a gradient.
        teacher_classifier: weight of the teacher's classifier; receives no gradient.
        weight: factor on the term.
        pool_size: height and width to which the maps are average-pooled; if a map is smaller, both are pooled to its
            size instead.
        normalize: scale the map of each class to length 1, so that only the relative values of its positions count.

    Returns:
        ``{"catkd": weight * CAT}``.

    Raises:
        ValueError: invalid maps, classifiers or hyper-parameters.
    """
    check_pairs([student], [teacher])
    if len(student_classifier) != len(teacher_classifier):
        raise ValueError(
            f"the student has {len(student_classifier)} classes and the teacher {len(teacher_classifier)}; "
            "give both models the same num_classes."
        )
    student, teacher = pool_to_smaller(student, teacher, largest=pool_size)
    ours = _activation_maps(student, student_classifier, normalize)
    theirs = _activation_maps(teacher.detach(), teacher_classifier.detach(), normalize)
    return {"catkd": weight * F.mse_loss(ours, theirs)}


def _activation_maps(feature: Tensor, classifier: Tensor, normalize: bool) -> Tensor:
    """``(B, channels, H, W)`` to ``(B, C, H * W)``."""
    if feature.shape[1] != classifier.shape[1]:
        raise ValueError(
            f"the classifier takes {classifier.shape[1]} features and the map has {feature.shape[1]} channels; tap the "
            "last map."
        )
    maps = classifier.to(feature.dtype) @ feature.flatten(2)
    return unit_vectors(maps) if normalize else maps


@register_loss("catkd")
class CATKDLoss(FeatureLoss):
    """``ce_weight * CE + weight * CAT`` on the last maps; see :func:`catkd_loss`.

    The student keeps its classifier, which may be pretrained. In the published code the classifier is a new 1x1
    convolution without bias; in ResNets, WRNs and MobileNetV2 its initial standard deviation is ``sqrt(2 / C)``: 0.141
    for 100 classes, compared with 0.036 of resnet8x4's linear layer.
    """

    method = "Class attention transfer"
    papers = ("2304.12777",)
    function = staticmethod(catkd_loss)

    single = True
    own_buffers = ("teacher_classifier",)  # a constant

    weight: Weight = 400.0
    pool_size: Count = 2
    normalize: bool = True

    teacher_classifier: Tensor = field(init=False)
    _classifier: nn.Linear = field(init=False)

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the map before global pooling."""
        return (stages.last_map,)

    def connect(
        self, student: nn.Module, teacher: nn.Module | None, image_shape: Sequence[int], train_label: Tensor
    ) -> None:
        """Chooses the maps, and stores the student's classifier and a copy of the weight of the teacher's."""
        super().connect(student, teacher, image_shape, train_label)
        assert teacher is not None
        hold_outside(self, "_classifier", classifier_of(student))
        self.register_buffer("teacher_classifier", classifier_of(teacher).weight.detach().clone(), persistent=False)

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor], step: StepContext) -> dict[str, Tensor]:
        """Returns ``catkd``."""
        return self.call_function(student[0], teacher[0], self._classifier.weight, self.teacher_classifier)
