"""Knowledge review (ReviewKD): Chen et al., CVPR 2021, arXiv 2104.09044."""

from collections.abc import Sequence
from dataclasses import KW_ONLY

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.losses.base import Epochs
from rld_lightning.losses.features.base import BatchNorm2d, FeatureLoss, average_pool, check_pairs
from rld_lightning.losses.numerics import total
from rld_lightning.losses.ranges import Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.models.stages import Stages


@checked
def reviewkd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], *, weight: Weight = 1.0) -> dict[str, Tensor]:
    """Computes the hierarchical context loss (HCL): squared differences at several resolutions, summed over the stages.

    The loss of a stage is the weighted mean of the mean squared differences of the maps at full size and average-pooled
    to 4 x 4, 2 x 2 and 1 x 1, with weights 1, 1/2, 1/4 and 1/8. Resolutions that are not below the map's height are
    skipped, and the remaining ones have the first weights.

    Args:
        student: maps ``(B, channels, H, W)``, after fusion.
        teacher: as many maps of the same shapes.
        weight: factor on the term.

    Returns:
        ``{"reviewkd": weight * HCL}``.

    Raises:
        ValueError: invalid maps or hyper-parameters.
    """
    check_pairs(student, teacher)
    stages = []
    for ours, theirs in zip(student, teacher, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(
                f"student map {tuple(ours.shape)} and teacher map {tuple(theirs.shape)} must have the same shape; the "
                "student's go through the fusion modules first."
            )
        difference = ours - theirs.detach()
        # Pooling is linear, so the difference can be pooled instead of both maps.
        levels = [difference, *(average_pool(difference, (size, size)) for size in (4, 2, 1) if size < ours.shape[2])]
        shares = [0.5**level for level in range(len(levels))]
        means = (share * level.square().mean() for share, level in zip(shares, levels, strict=True))
        stages.append(total(means) / sum(shares))
    return {"reviewkd": weight * total(stages)}


@register_loss("reviewkd")
class ReviewKDLoss(FeatureLoss):
    """``ce_weight * CE + warmup * weight * HCL`` of fused features; see :func:`reviewkd_loss`.

    The student's stages (without the stem) and its pooled features are fused from deep to shallow, each with the fused
    feature of the next deeper one, and compared with the teacher's stages before their ReLU and its pooled features. If
    the teacher's stages do not end in a ReLU (MobileNetV2, timm's networks), their outputs are used. On ImageNet, the
    published code also uses the student's stages before their ReLU.

    The published code tunes ``weight`` for each pair, from 0.6 to 8. It ignores the width of fusion in its config; this
    does the same: the width is that of the student's pooled features, at most 512. The warm-up counts epochs from 1
    (from 0 in the authors' code).

    Args:
        student_preactivations: also use the student's stages before their ReLU, if they end in one.
        others: see :class:`~rld_lightning.losses.features.base.FeatureLoss`.
    """

    method = "Knowledge review"
    papers = ("2104.09044",)
    function = staticmethod(reviewkd_loss)

    weight: Weight = 1.0
    _: KW_ONLY
    student_preactivations: bool = False
    warmup_epochs: Epochs = 20

    def student_paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the stages, after or before their ReLU, and the pooled features."""
        paths = (stages.preactivations if self.student_preactivations else ()) or stages.features
        # Each stage has a norm, the stem has none: equally many norms and features mean no stem (MobileNetV1).
        has_stem = len(stages.norms) != len(stages.features)
        return *(paths[1:] if has_stem else paths), stages.pooled

    def teacher_paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the stages before their ReLU, or their outputs if there is none, and the pooled features."""
        return *(stages.preactivations or stages.features)[1:], stages.pooled

    def build(self, student_shapes: Sequence[torch.Size], teacher_shapes: Sequence[torch.Size]) -> None:
        """Builds a fusion module for each pair of features, deep to shallow."""
        for shape in (*student_shapes, *teacher_shapes):
            if len(shape) not in (2, 4):
                raise ValueError(
                    f"ReviewKD compares maps (B, channels, H, W) and vectors (B, D), not {tuple(shape)}; choose "
                    "another network, or name module paths (+loss.student_taps=[...] +loss.teacher_taps=[...])."
                )
        width = min(512, student_shapes[-1][1])
        pairs = reversed(list(zip(student_shapes, teacher_shapes, strict=True)))
        self.fusions = nn.ModuleList(
            Fusion(ours[1], width, theirs[1], has_deeper=i > 0) for i, (ours, theirs) in enumerate(pairs)
        )

    def align(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Fuses the student's maps to the teacher's shapes; vectors become maps of one position."""
        student, teacher = [_as_map(one) for one in student], [_as_map(one) for one in teacher]
        fused, deeper = [], None
        for fusion, ours, theirs in zip(self.fusions, reversed(student), reversed(teacher), strict=True):
            out, deeper = fusion(ours, deeper, theirs.shape[2:])
            fused.append(out)
        return fused[::-1], teacher


class Fusion(nn.Module):
    """Attention-based fusion (the paper's ABF) of a stage with the fused feature of the deeper ones.

    Args:
        in_channels: channels of the student's stage.
        width: channels of the fused feature.
        out_channels: channels of the teacher's stage.
        has_deeper: whether there is a deeper stage.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, *, has_deeper: bool) -> None:
        super().__init__()
        narrow = nn.Conv2d(in_channels, width, 1, bias=False)
        self.narrow = nn.Sequential(narrow, BatchNorm2d(width))
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if has_deeper else None
        widen = nn.Conv2d(width, out_channels, 3, padding=1, bias=False)
        self.widen = nn.Sequential(widen, BatchNorm2d(out_channels))
        nn.init.kaiming_uniform_(narrow.weight, a=1)
        nn.init.kaiming_uniform_(widen.weight, a=1)

    def forward(self, stage: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fuses a stage with the deeper feature.

        Args:
            stage: ``(B, in_channels, h, w)``.
            deeper: ``(B, width, *, *)``, the fused feature of the next deeper module.
            size: the teacher's height and width H, W.

        Returns:
            ``(B, out_channels, H, W)``, to compare, and ``(B, width, H, W)``, the fused feature for the next module.
        """
        out = self.narrow(stage)
        if self.attention is not None and deeper is not None:
            deeper = _resize(deeper, out.shape[2:])
            ours, theirs = self.attention(torch.cat([out, deeper], 1)).split(1, 1)
            out = ours * out + theirs * deeper
        out = _resize(out, size)
        return self.widen(out), out


def _as_map(feature: Tensor) -> Tensor:
    return feature if feature.ndim == 4 else feature[:, :, None, None]


def _resize(map_: Tensor, size: Sequence[int]) -> Tensor:
    return map_ if map_.shape[2:] == tuple(size) else F.interpolate(map_, tuple(size), mode="nearest")
