"""FitNet hints: Romero et al., ICLR 2015, arXiv 1412.6550."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.losses.features.base import FeatureLoss
from rld_lightning.losses.ranges import Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages


@checked
def fitnet_loss(student: Tensor, teacher: Tensor, *, weight: Weight = 100.0) -> dict[str, Tensor]:
    """Computes the squared difference of the guided and the hint map, mean over all elements.

    Equation 3 of the paper has half the sum over elements; this follows mdistiller's mean, to which the default weight
    belongs.

    Args:
        student: ``(B, channels, H, W)``, mapped to the teacher's shape by a regressor.
        teacher: the same shape; never receives a gradient.
        weight: factor on the term.

    Returns:
        ``{"fitnet": weight * MSE}``.

    Raises:
        ValueError: invalid shapes or weight.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the regressed student map {tuple(student.shape)} and the hint {tuple(teacher.shape)} must have the same "
            "shape."
        )
    return {"fitnet": weight * F.mse_loss(student, teacher.detach())}


@register_loss("fitnet")
class FitNetLoss(FeatureLoss):
    """``ce_weight * CE + weight * MSE`` of one stage, the hint; see :func:`fitnet_loss`.

    A regressor maps the student's map to the teacher's shape: a convolution, batch norm and ReLU. The convolution is
    1x1 if the maps have equal size, 3x3 with stride 2 if the student's is twice as large, 4x4 transposed with stride 2
    if the teacher's is twice as large, and for any other larger student map one without padding, whose kernel size is
    the difference of the sizes plus 1. As in mdistiller, hint and labels are learned together, without the paper's
    first training stage. mdistiller's convolutions also have a bias, which the batch norm cancels.

    Args:
        hint_layer: index of the hint among the network's features: 0 is the stem, negative values count from the deep
            end.
        others: see :class:`~rld_lightning.losses.features.base.FeatureLoss`.
    """

    method = "Hints: one stage through a regressor"
    papers = ("1412.6550",)
    function = staticmethod(fitnet_loss)

    single = True

    weight: Weight = 100.0
    hint_layer: int = 2

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the hint layer."""
        size = len(stages.features)
        if not -size <= self.hint_layer < size:
            raise ValueError(
                f"hint_layer={self.hint_layer!r} is not allowed; the network has {size} features, so it must lie "
                f"between {-size} and {size - 1}."
            )
        return (stages.features[self.hint_layer],)

    def build(self, student_shapes: Sequence[torch.Size], teacher_shapes: Sequence[torch.Size]) -> None:
        """Builds the regressor."""
        (student,), (teacher,) = student_shapes, teacher_shapes
        self.regressor = nn.Sequential(
            OrderedDict(
                conv=_matching_convolution(student, teacher),
                bn=nn.BatchNorm2d(teacher[1]),
                relu=nn.ReLU(inplace=True),
            )
        )

    def align(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Applies the regressor to the student's map."""
        return [self.regressor(student[0])], teacher


def _matching_convolution(student: torch.Size, teacher: torch.Size) -> nn.Module:
    if len(student) != 4 or len(teacher) != 4:
        raise ValueError(f"FitNetLoss compares maps (B, channels, H, W), got {tuple(student)} and {tuple(teacher)}.")
    channels, ours, theirs = (student[1], teacher[1]), student[2:], teacher[2:]
    # No bias: the batch norm that follows would cancel it.
    if all(s == 2 * t for s, t in zip(ours, theirs, strict=True)):
        return nn.Conv2d(*channels, kernel_size=3, stride=2, padding=1, bias=False)
    if all(2 * s == t for s, t in zip(ours, theirs, strict=True)):
        return nn.ConvTranspose2d(*channels, kernel_size=4, stride=2, padding=1, bias=False)
    if all(s >= t for s, t in zip(ours, theirs, strict=True)):
        return nn.Conv2d(*channels, (ours[0] - theirs[0] + 1, ours[1] - theirs[1] + 1), bias=False)
    raise ValueError(
        f"a student map of size {tuple(ours)} cannot be brought to the teacher's {tuple(theirs)}, which must not be "
        "larger unless it is exactly twice as large; choose another hint_layer, or name both module paths "
        "(+loss.student_taps=[...] +loss.teacher_taps=[...])."
    )
