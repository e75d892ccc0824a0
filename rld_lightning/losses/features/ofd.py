"""Overhaul of feature distillation (OFD): Heo et al., ICCV 2019, arXiv 1904.01866."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY
from operator import index
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from rld_lightning.losses.base import StepContext
from rld_lightning.losses.features.base import FeatureLoss, check_pairs, pool_to_smaller
from rld_lightning.losses.numerics import total
from rld_lightning.losses.ranges import Weight, checked, must_be
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages, stages_of
from rld_lightning.models.taps import unwrap

KernelSize = Annotated[int, must_be("odd and >= 1 to keep the size", lambda size: index(size) >= 1 and size % 2 == 1)]


@checked
def ofd_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], margin: Sequence[Tensor], *, weight: Weight = 1e-3
) -> dict[str, Tensor]:
    """Computes the squared difference of features before a ReLU, ignoring differences without effect after the ReLU.

    With the maps before the ReLU, t of the teacher and s of the student, and the margin m < 0 of each channel
    (:func:`batch_norm_margin`)::

        t' = max(t, m)                                  (margin ReLU)
        d  = 0 if s <= t' <= 0, else (s - t')^2         (partial L2 distance)

    Summed over channels and positions, averaged over the batch. The deepest stage has weight 1, each shallower one half
    the weight of the next deeper, as in the published code.

    Args:
        student: maps ``(B, channels, H, W)``, shallow to deep, with the teacher's channels.
        teacher: as many maps; if sizes differ, the larger map is average-pooled to the smaller (before the margin
            ReLU).
        margin: ``(channels,)`` of each stage, <= 0.
        weight: factor on the term.

    Returns:
        ``{"ofd": weight * OFD}``.

    Raises:
        ValueError: invalid maps, margins or hyper-parameters.
    """
    check_pairs(student, teacher)
    stages = []
    for depth, (ours, theirs, low) in enumerate(zip(student, teacher, margin, strict=True), start=1):
        ours, theirs = pool_to_smaller(ours, theirs)
        if ours.shape != theirs.shape or low.shape != theirs.shape[1:2]:
            raise ValueError(
                f"student map {tuple(ours.shape)}, teacher map {tuple(theirs.shape)} and margin {tuple(low.shape)} "
                "must have the same channels; the student's go through a connector first."
            )
        theirs = torch.maximum(theirs.detach(), low.to(theirs).view(-1, 1, 1))
        silent = (ours <= theirs) & (theirs <= 0)
        distance = torch.where(silent, 0.0, ours - theirs).square().sum() / len(ours)
        stages.append(distance / 2 ** (len(student) - depth))
    return {"ofd": weight * total(stages)}


def batch_norm_margin(scale: Tensor, shift: Tensor) -> Tensor:
    """Returns the mean of a batch norm's negative outputs: ``E[x | x < 0]`` of ``x ~ Normal(shift, scale^2)``.

    If the probability of x < 0 is 0.001 or less, it is ``-3 |scale|`` instead, as in the published code.

    Args:
        scale: ``(channels,)``, the weight of the batch norm.
        shift: ``(channels,)``, the bias of the batch norm.

    Returns:
        ``(channels,)``, at most 0, in the type of ``scale``.
    """
    # With a scale of 0, x is constant: the limit is the shift if it is negative, and 0 otherwise.
    sigma = scale.detach().cpu().double().abs().clamp(min=torch.finfo(torch.float64).tiny)
    mean = shift.detach().cpu().double()
    ratio = mean / sigma
    negative = torch.special.ndtr(-ratio)
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    expected = mean - sigma * density / negative.clamp(min=1e-3)
    return torch.where(negative > 1e-3, expected, -3 * sigma).to(scale)


@register_loss("ofd")
class OFDLoss(FeatureLoss):
    """``ce_weight * CE + weight * OFD`` on all stages but the stem, before their ReLU; see :func:`ofd_loss`.

    A convolution and a batch norm per stage connect the student's maps. The teacher is in evaluation mode, as in all
    losses here: its features do not depend on the batch, and its running statistics do not change. The scripts of the
    authors and mdistiller leave its batch norms in training mode, which normalises by the batch and updates the running
    statistics; a step's gradient differs by about a tenth. ``model.teacher.batch_statistics=true`` selects this for a
    run.

    If the numbers of stages differ, the deepest are compared, as in mdistiller, each with its own margin (mdistiller
    counts margins from the shallow end). Not supported are networks whose stages do not end in a ReLU (MobileNetV2,
    timm's) and, as teachers, the ShuffleNets, whose ReLUs do not follow a single batch norm. On ImageNet:
    ``weight=1e-4``.

    Args:
        kernel_size: kernel size of the connectors' convolutions, odd.
        teacher_norms: paths of the teacher's batch norms before its taps; if empty, they are chosen from its stages.
        others: see :class:`~rld_lightning.losses.features.base.FeatureLoss`.
    """

    method = "Overhaul of feature distillation"
    papers = ("1904.01866",)

    weight: Weight = 1e-3
    kernel_size: KernelSize = 1
    _: KW_ONLY
    teacher_norms: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.teacher_norms = tuple(self.teacher_norms or ())

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the inputs of the ReLUs that end the stages, without the stem."""
        return stages.preactivations[1:]

    def build(self, student_shapes: Sequence[torch.Size], teacher_shapes: Sequence[torch.Size]) -> None:
        """Builds a convolution and a batch norm for each stage."""
        pairs = zip(student_shapes, teacher_shapes, strict=True)
        self.connectors = nn.ModuleList(_connector(ours[1], theirs[1], self.kernel_size) for ours, theirs in pairs)

    def connect(
        self, student: nn.Module, teacher: nn.Module | None, image_shape: Sequence[int], train_label: Tensor
    ) -> None:
        """Connects as in the base class, then computes the margins from the teacher's batch norms."""
        super().connect(student, teacher, image_shape, train_label)
        assert teacher is not None
        self.teacher_norms = (self.teacher_norms or stages_of(teacher).norms)[-len(self.teacher_taps) :]
        if len(self.teacher_norms) < len(self.teacher_taps):
            raise ValueError(
                f"{type(unwrap(teacher)).__name__} has no single batch norm before the ReLUs of its stages; choose "
                "another teacher or loss, or name one for each tap (+loss.teacher_norms=[...])."
            )
        self.own_buffers = tuple(f"margin{i}" for i in range(len(self.connectors)))  # constants
        connectors: list[Any] = list(self.connectors)
        for i, (path, connector) in enumerate(zip(self.teacher_norms, connectors, strict=True)):
            norm: Any = unwrap(teacher).get_submodule(path)
            if getattr(norm, "num_features", None) != connector[0].out_channels or norm.weight is None:
                raise ValueError(
                    f"{path} is not a batch norm with {connector[0].out_channels} scales and shifts; name the one "
                    f"before {self.teacher_taps[i]} (+loss.teacher_norms=[...])."
                )
            # Not in checkpoints: computed from the teacher at the start of each run.
            self.register_buffer(f"margin{i}", batch_norm_margin(norm.weight, norm.bias), persistent=False)

    def align(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps the student's maps to the teacher's channels."""
        return [connector(map_) for connector, map_ in zip(self.connectors, student, strict=True)], teacher

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor], step: StepContext) -> dict[str, Tensor]:
        """Returns ``ofd``."""
        margin = [getattr(self, f"margin{i}") for i in range(len(student))]
        return ofd_loss(student, teacher, margin, weight=self.weight)


def _connector(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
