"""Base class of the losses on features: taps and connectors; and functions that these losses share."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from rld_lightning.losses.base import DistillationLoss, StepContext
from rld_lightning.models.stages import Stages, stages_of
from rld_lightning.models.taps import feature_shapes


@dataclass(eq=False, repr=False)
class FeatureLoss(DistillationLoss):
    """Base of the methods that compare features of student and teacher.

    A subclass returns the taps in :meth:`paths`, builds its learnable connectors from the features' shapes in
    :meth:`build`, applies them in :meth:`align` and computes its terms in :meth:`feature_terms`. Only :meth:`paths` and
    either :meth:`feature_terms` or :attr:`function` are required. Call :meth:`connect` before training in your own
    loop::

        loss = ATLoss()
        loss.connect(student, teacher, (3, 32, 32), train_label)
        optimizer = SGD([*student.parameters(), *loss.parameters()], lr=0.05)
        student_output = ModelOutput(*forward_with_taps(student, images, loss.student_taps))

    Attributes:
        single: whether exactly one feature of each network is compared.
        maps: whether all features must be maps ``(B, channels, H, W)``.
        from_shallow: whether networks with different numbers of stages are compared from the shallow end, as in the
            published code of some methods; otherwise, and if taps are given, from the deep end.

    Args:
        student_taps: tap paths in the student; if empty, they are chosen from the network's stages.
        teacher_taps: tap paths in the teacher, as many.

    The others are those of :class:`~rld_lightning.losses.base.DistillationLoss`, without ``ignore_index``.
    """

    single: ClassVar[bool] = False
    maps: ClassVar[bool] = False
    from_shallow: ClassVar[bool] = False

    ignore_index: int = field(default=-100, init=False)
    _: KW_ONLY
    student_taps: Sequence[str] = ()
    teacher_taps: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        student_taps, teacher_taps = self.student_taps or (), self.teacher_taps or ()
        if student_taps and teacher_taps and len(student_taps) != len(teacher_taps):
            raise ValueError(
                f"student_taps {list(student_taps)} and teacher_taps {list(teacher_taps)} must be equally many."
            )
        self.student_taps = tuple(student_taps)
        self.teacher_taps = tuple(teacher_taps)
        self._connected = False

    def paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the tap paths in a network, shallow to deep; an empty path if the network has no such feature."""
        raise NotImplementedError(f"{type(self).__name__} must define paths(stages).")

    def student_paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the tap paths in the student, for methods whose taps differ between the networks."""
        return self.paths(stages)

    def teacher_paths(self, stages: Stages) -> tuple[str, ...]:
        """Returns the tap paths in the teacher."""
        return self.paths(stages)

    def build(self, student_shapes: Sequence[torch.Size], teacher_shapes: Sequence[torch.Size]) -> None:
        """Builds the connectors from the features' shapes (first dimension: the batch)."""

    def align(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Applies the connectors, in the precision of the features."""
        return student, teacher

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor], step: StepContext) -> dict[str, Tensor]:
        """Returns the terms of the aligned features, which are float32 or float64 and in the order of the taps.

        By default, the terms of :attr:`function` for both lists of features, or, if :attr:`single`, for both features.
        """
        if not hasattr(self, "function"):
            raise NotImplementedError(f"{type(self).__name__} must define feature_terms(student, teacher, step).")
        return self.call_function(student[0], teacher[0]) if self.single else self.call_function(student, teacher)

    def connect(
        self, student: nn.Module, teacher: nn.Module | None, image_shape: Sequence[int], train_label: Tensor
    ) -> None:
        """Chooses the taps, runs both networks once on zeros to get the features' shapes, and builds the connectors.

        If the networks have different numbers of stages, the deepest ones are compared, or the shallowest
        (:attr:`from_shallow`).
        """
        assert teacher is not None  # ``needs_teacher``
        shallow = self.from_shallow and not (self.student_taps or self.teacher_taps)
        student_taps = self.student_taps or self._check_paths(self.student_paths(stages_of(student)), student)
        teacher_taps = self.teacher_taps or self._check_paths(self.teacher_paths(stages_of(teacher)), teacher)
        pairs = min(len(student_taps), len(teacher_taps))
        compared = slice(pairs) if shallow else slice(-pairs, None)
        self.student_taps, self.teacher_taps = student_taps[compared], teacher_taps[compared]
        if self.single and pairs > 1:
            raise ValueError(
                f"{type(self).__name__} compares one feature of each network, got the taps {list(self.student_taps)} "
                f"and {list(self.teacher_taps)}; name one each."
            )
        shapes = [
            list(feature_shapes(network, image_shape, taps).values())
            for network, taps in ((student, self.student_taps), (teacher, self.teacher_taps))
        ]
        for path, shape in zip((*self.student_taps, *self.teacher_taps), [*shapes[0], *shapes[1]], strict=True):
            if self.maps and len(shape) != 4:
                raise ValueError(
                    f"{type(self).__name__} compares maps (B, channels, H, W), and {path} gives {tuple(shape)}; choose "
                    "another network, loss or tap."
                )
        self.build(*shapes)
        self._connected = True

    def terms(self, step: StepContext) -> dict[str, Tensor]:
        """Returns the :meth:`feature_terms` of the aligned features."""
        if not self._connected:
            raise RuntimeError(f"{type(self).__name__} does not know the networks yet: call its connect(...) first.")
        student, teacher = tapped_features(self, step)
        # Connectors are small networks, which tolerate half precision as well as the student and the teacher do.
        half = student[0].dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(student[0].device.type, student[0].dtype if half else None, enabled=half):
            student, teacher = self.align(student, teacher)
        return self.feature_terms([_to_float32(x) for x in student], [_to_float32(x) for x in teacher], step)

    def _check_paths(self, paths: tuple[str, ...], network: nn.Module) -> tuple[str, ...]:
        if not paths or not all(paths):
            raise ValueError(
                f"{type(network).__name__} does not have the features that {type(self).__name__} compares; choose "
                "another network or loss, or name module paths (+loss.student_taps=[...] +loss.teacher_taps=[...])."
            )
        return paths


def tapped_features(loss: DistillationLoss, step: StepContext) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the student's and the teacher's features that a connected loss uses, in the order of its taps.

    Raises:
        ValueError: the step lacks one of them.
    """
    assert step.teacher is not None
    sides = (step.student, loss.student_taps, "student"), (step.teacher, loss.teacher_taps, "teacher")
    missing = [f"{path} of the {side}" for output, taps, side in sides for path in taps if path not in output.features]
    if missing:
        raise ValueError(
            f"{type(loss).__name__} needs features that the step lacks: {', '.join(missing)}; call it with a "
            "StepContext of ModelOutput(*forward_with_taps(student, images, loss.student_taps)) and the same of the "
            "teacher."
        )
    student, teacher = ([output.features[path] for path in taps] for output, taps, _ in sides)
    return student, teacher


def _to_float32(feature: Tensor) -> Tensor:
    """Casts half precision to float32; float64 stays."""
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


class _AcceptsOneVector(nn.modules.batchnorm._BatchNorm):
    """Batch norm that uses its running statistics for a batch of one vector, which has no variance."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises the input."""
        if input.numel() > input.shape[1]:
            return super().forward(input)
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class BatchNorm1d(_AcceptsOneVector, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` for connectors: an epoch's last batch may hold a single image."""


class BatchNorm2d(_AcceptsOneVector, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` for connectors: an epoch's last batch may hold a single image."""


def check_pairs(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Raises ``ValueError`` unless both lists are non-empty and of equal length, with equal batch sizes."""
    if not student or len(student) != len(teacher):
        raise ValueError(f"there must be as many student features ({len(student)}) as teacher ones ({len(teacher)}).")
    sizes = {len(feature) for feature in (*student, *teacher)}
    if len(sizes) > 1:
        raise ValueError(f"all features must be of the same batch, got batch sizes {sorted(sizes)}.")


def unit_vectors(feature: Tensor) -> Tensor:
    """Normalises the vectors ``(*, D)`` along the last dimension to length 1; zeros stay zeros, without gradient.

    With ``F.normalize``'s small denominator, a vector of zeros would have a gradient of 1e12.
    """
    length = feature.norm(dim=-1, keepdim=True)
    return feature / length.masked_fill(length < 1e-12, torch.inf)


def pool_to_smaller(student: Tensor, teacher: Tensor, largest: int | None = None) -> tuple[Tensor, Tensor]:
    """Average-pools the larger of two maps ``(B, channels, H, W)`` to the other's height and width.

    Args:
        student: the student's map.
        teacher: the teacher's map.
        largest: if given, both are pooled to at most this height and width.

    Raises:
        ValueError: one of them is not a map.
    """
    for name, feature in (("student", student), ("teacher", teacher)):
        if feature.ndim != 4:
            raise ValueError(f"the {name}'s feature must be a map (B, channels, H, W), got {tuple(feature.shape)}.")
    allowed = student.shape[2:] if largest is None else (largest, largest)
    height, width = (min(sizes) for sizes in zip(student.shape[2:], teacher.shape[2:], allowed, strict=True))
    pooled = [
        feature if feature.shape[2:] == (height, width) else average_pool(feature, (height, width))
        for feature in (student, teacher)
    ]
    return pooled[0], pooled[1]


def average_pool(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pools a map ``(B, channels, H, W)`` to a height and width, as ``adaptive_avg_pool2d`` does.

    On an Apple GPU, that function needs a size that divides the map's; pooling is linear, so here two matrices do it.
    """
    (height, width), (rows, columns) = feature.shape[2:], size
    if feature.device.type != "mps" or not (height % rows or width % columns):
        return nn.functional.adaptive_avg_pool2d(feature, size)
    down, across = window_means(height, rows).to(feature), window_means(width, columns).to(feature)
    return down @ feature @ across.mT


def window_means(length: int, windows: int) -> Tensor:
    """Returns the matrix ``(windows, length)`` that averages each window of ``adaptive_avg_pool1d``."""
    place, window = torch.arange(length), torch.arange(windows).unsqueeze(1)
    inside = (place >= window * length // windows) & (place < ((window + 1) * length - 1) // windows + 1)
    return inside / inside.sum(1, keepdim=True)
