"""What every method that looks inside the networks has in common: where it looks, and its connectors."""

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

    A subclass says where it looks with :meth:`paths`, builds its learnable connectors from the shapes found there in
    :meth:`build`, applies them in :meth:`align` and compares in :meth:`feature_terms`; only the first and the last are
    always needed. :meth:`connect` is called before training; in a loop of your own::

        loss = ATLoss()
        loss.connect(student, teacher, (3, 32, 32), train_label)
        optimizer = SGD([*student.parameters(), *loss.parameters()], lr=0.05)
        student_output = ModelOutput(*forward_with_taps(student, images, loss.student_taps))

    Attributes:
        single: whether one feature of each network is compared.
        maps: whether all features must be maps ``(B, channels, H, W)``.
        from_shallow: whether the stages of networks with different numbers of them are compared from the shallow end,
            as in the published code of some methods; otherwise, and where taps are named, from the deep end.

    Args:
        student_taps: tap paths in the student; none chooses them from the network's stages.
        teacher_taps: tap paths in the teacher, as many.

    The others are those of :class:`~rld_lightning.losses.base.DistillationLoss`, but no label is ignored.
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
        """Where to look in a network, shallow to deep; an empty path says that the network lacks the place."""
        raise NotImplementedError(f"{type(self).__name__} must define paths(stages).")

    def student_paths(self, stages: Stages) -> tuple[str, ...]:
        """Where to look in the student, for methods that look elsewhere in the teacher."""
        return self.paths(stages)

    def teacher_paths(self, stages: Stages) -> tuple[str, ...]:
        """Where to look in the teacher."""
        return self.paths(stages)

    def build(self, student_shapes: Sequence[torch.Size], teacher_shapes: Sequence[torch.Size]) -> None:
        """Builds the connectors from the shapes at the taps, whose first dimension is the batch."""

    def align(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Applies the connectors; runs in the precision that the features were computed in."""
        return student, teacher

    def feature_terms(self, student: list[Tensor], teacher: list[Tensor], step: StepContext) -> dict[str, Tensor]:
        """The terms from aligned features, in float32 or float64, in the order of the taps."""
        raise NotImplementedError(f"{type(self).__name__} must define feature_terms(student, teacher, step).")

    def connect(
        self, student: nn.Module, teacher: nn.Module | None, image_shape: Sequence[int], train_label: Tensor
    ) -> None:
        """Chooses the taps, runs both networks once on zeros for the shapes there, and builds the connectors.

        Where the networks have different numbers of stages, the deepest ones are compared, or the shallowest
        (:attr:`from_shallow`).
        """
        assert teacher is not None  # the training module has asked for one
        shallow = self.from_shallow and not (self.student_taps or self.teacher_taps)
        student_taps = self.student_taps or self._chosen(self.student_paths(stages_of(student)), student)
        teacher_taps = self.teacher_taps or self._chosen(self.teacher_paths(stages_of(teacher)), teacher)
        pairs = min(len(student_taps), len(teacher_taps))
        compared = slice(pairs) if shallow else slice(-pairs, None)
        self.student_taps, self.teacher_taps = student_taps[compared], teacher_taps[compared]
        if self.single and pairs > 1:
            raise ValueError(
                f"{type(self).__name__} compares one feature of each network, got the taps {list(self.student_taps)} "
                f"and {list(self.teacher_taps)}; name one each."
            )
        found = [
            list(feature_shapes(network, image_shape, taps).values())
            for network, taps in ((student, self.student_taps), (teacher, self.teacher_taps))
        ]
        for path, shape in zip((*self.student_taps, *self.teacher_taps), [*found[0], *found[1]], strict=True):
            if self.maps and len(shape) != 4:
                raise ValueError(
                    f"{type(self).__name__} compares maps (B, channels, H, W), and {path} gives {tuple(shape)}; choose "
                    "another network, loss or tap."
                )
        self.build(*found)
        self._connected = True

    def terms(self, step: StepContext) -> dict[str, Tensor]:
        """:meth:`feature_terms` of the aligned features."""
        if not self._connected:
            raise RuntimeError(f"{type(self).__name__} does not know the networks yet: call its connect(...) first.")
        student, teacher = tapped(self, step)
        # Connectors are small networks, hence as tolerant of half precision as the ones that they connect.
        half = student[0].dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(student[0].device.type, student[0].dtype if half else None, enabled=half):
            student, teacher = self.align(student, teacher)
        return self.feature_terms([_precise(one) for one in student], [_precise(one) for one in teacher], step)

    def _chosen(self, paths: tuple[str, ...], network: nn.Module) -> tuple[str, ...]:
        if not paths or not all(paths):
            raise ValueError(
                f"{type(network).__name__} does not have the features that {type(self).__name__} compares; choose "
                "another network or loss, or name module paths (+loss.student_taps=[...] +loss.teacher_taps=[...])."
            )
        return paths


def tapped(loss: DistillationLoss, step: StepContext) -> tuple[list[Tensor], list[Tensor]]:
    """The features that a connected loss looks at: the student's and the teacher's, in the order of its taps.

    Raises:
        ValueError: the step does not hold all of them.
    """
    assert step.teacher is not None
    sides = (step.student, loss.student_taps, "student"), (step.teacher, loss.teacher_taps, "teacher")
    missing = [f"{path} of the {side}" for output, taps, side in sides for path in taps if path not in output.features]
    if missing:
        raise ValueError(
            f"{type(loss).__name__} looks inside the networks and misses {', '.join(missing)}; call it with a "
            "StepContext of ModelOutput(*forward_with_taps(student, images, loss.student_taps)) and the same of the "
            "teacher."
        )
    student, teacher = ([output.features[path] for path in taps] for output, taps, _ in sides)
    return student, teacher


def _precise(feature: Tensor) -> Tensor:
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


class _TakesOneVector(nn.modules.batchnorm._BatchNorm):
    """Lets a batch norm take a last batch of one vector: it has no variance, so the running statistics serve."""

    def forward(self, input: Tensor) -> Tensor:
        """As the batch norm."""
        if input.numel() > input.shape[1]:
            return super().forward(input)
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class BatchNorm1d(_TakesOneVector, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` for connectors, whose last batch of an epoch may be of one image."""


class BatchNorm2d(_TakesOneVector, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` for connectors, whose last batch of an epoch may be of one image."""


def check_pairs(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    """Raises ``ValueError`` unless both lists are equally long and not empty, with equal batch sizes."""
    if not student or len(student) != len(teacher):
        raise ValueError(f"there must be as many student features ({len(student)}) as teacher ones ({len(teacher)}).")
    sizes = {len(feature) for feature in (*student, *teacher)}
    if len(sizes) > 1:
        raise ValueError(f"all features must be of the same batch, got batch sizes {sorted(sizes)}.")


def unit_vectors(feature: Tensor) -> Tensor:
    """Brings the vectors ``(*, D)`` along the last dimension to length 1; zeros stay zeros, without a gradient.

    With the usual small denominator instead, a vector of zeros would have a gradient of 1e12.
    """
    length = feature.norm(dim=-1, keepdim=True)
    return feature / length.masked_fill(length < 1e-12, torch.inf)


def pool_to_smaller(student: Tensor, teacher: Tensor, largest: int | None = None) -> tuple[Tensor, Tensor]:
    """Average-pools the larger of two maps ``(B, channels, H, W)`` to the other's height and width.

    Args:
        student: any map.
        teacher: any other.
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
        feature if feature.shape[2:] == (height, width) else nn.functional.adaptive_avg_pool2d(feature, (height, width))
        for feature in (student, teacher)
    ]
    return pooled[0], pooled[1]
