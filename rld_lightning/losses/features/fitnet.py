"""FitNet hints: Romero et al., ICLR 2015, arXiv 1412.6550."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.losses.base import StepContext
from rld_lightning.losses.features.base import FeatureLoss
from rld_lightning.losses.ranges import Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages


@checked
def fitnet_loss(student: Tensor, teacher: Tensor, *, weight: Weight = 100.0) -> dict[str, Tensor]:
    """Squared difference of the guided and the hint map, mean over all elements.

    Equation 3 of the paper has half of the sum over elements; mdistiller's mean, which the weight belongs to, is
    followed.

    Args:
        student: ``(B, channels, H, W)``, brought to the teacher's shape by a regressor.
        teacher: the same shape; never receives a gradient.
        weight: factor on the term.

    Returns:
        ``{"fitnet": weight * MSE}``.

    Raises:
        ValueError: shapes or a weight that do not fit.
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

    The student's map goes through a regressor: a convolution that gives it the teacher's shape, batch norm and ReLU.
    The convolution is 1x1 where the maps are equally large, 3x3 with stride 2 where the student's is twice as large,
    4x4 transposed with stride 2 where the teacher's is, and for any other larger student map a valid one, whose kernel
    is the difference plus 1. As in mdistiller, hint and labels are learned together, without the paper's first training
    stage; its convolutions have a bias as well, which the batch norm takes out again.

    Args:
        hint_layer: position of the hint among the network's features, where 0 is the stem; negative ones count from
            the deep end.
        others: see :class:`~rld_lightning.losses.features.base.FeatureLoss`.
    """

    method = "Hints: one stage through a regressor"
    papers = ("1412.6550",)

    single = True

    weight: Weight = 100.0
    hint_layer: int = 2

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """The hint layer."""
        size = len(stages.features)
        if not -size <= self.hint_layer < size:
            raise ValueError(
                f"hint_layer={self.hint_layer!r} is not allowed; the network has {size} features, so it must lie "
                f"between {-size} and {size - 1}."
            )
        return (stages.features[self.hint_layer],)

    def build(self, student_shapes: Sequence[torch.Size], teacher_shapes: Sequence[torch.Size]) -> None:
        """Makes the regressor."""
        (student,), (teacher,) = student_shapes, teacher_shapes
        self.regressor = nn.Sequential(
            OrderedDict(
                conv=_matching_convolution(student, teacher),
                bn=nn.BatchNorm2d(teacher[1]),
                relu=nn.ReLU(inplace=True),
            )
        )

    def align(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The regressor on the student's map."""
        return [self.regressor(student[0])], teacher

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor], step: StepContext) -> dict[str, Tensor]:
        """``fitnet``."""
        return fitnet_loss(student[0], teacher[0], weight=self.weight)


def _matching_convolution(student: torch.Size, teacher: torch.Size) -> nn.Module:
    if len(student) != 4 or len(teacher) != 4:
        raise ValueError(f"FitNetLoss compares maps (B, channels, H, W), got {tuple(student)} and {tuple(teacher)}.")
    channels, ours, theirs = (student[1], teacher[1]), student[2:], teacher[2:]
    # The batch norm that follows takes a bias out.
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
