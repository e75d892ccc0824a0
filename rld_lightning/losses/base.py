"""What every distillation loss has in common: what it may look at, the cross-entropy beside it, the warm-up."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.losses.given import check_tensor, way_out_for_label
from rld_lightning.losses.ranges import Weight, check_ranges, must_be, ranges_of
from rld_lightning.losses.rows import check_labels

Smoothing = Annotated[float, must_be("in [0, 1) (0 switches it off)", lambda share: 0 <= share < 1)]
Epochs = Annotated[int, must_be(">= 1 (1 is no warm-up)", lambda epochs: epochs >= 1)]


@dataclass(frozen=True)
class ModelOutput:
    """The output of a forward pass.

    Attributes:
        logits: ``(B, C)`` or ``(B, C, *)``.
        features: intermediate tensors by tap path; only those that the loss requested.
    """

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepContext:
    """Everything a loss may use in one step.

    Attributes:
        student: the student's output; carries the gradient.
        teacher: the teacher's output, without gradient; ``None`` for losses that need no teacher.
        label: ``(B,)`` or ``(B, *)`` class indices.
        index: ``(B,)`` position of each sample in the training split, for losses with a memory.
        epoch: the epoch counted from 1, for warm-up; ``None`` means that warm-up is over.
        student_strong: the student's output for the strongly augmented view of the same images; only for losses that
            need one.
        teacher_strong: the teacher's, likewise.
    """

    student: ModelOutput
    teacher: ModelOutput | None
    label: Tensor
    index: Tensor | None = None
    epoch: int | None = None
    student_strong: ModelOutput | None = None
    teacher_strong: ModelOutput | None = None

    @property
    def teacher_logits(self) -> Tensor:
        """The teacher's logits, for losses that need a teacher: those are not called without."""
        assert self.teacher is not None
        return self.teacher.logits


@dataclass(eq=False, repr=False)
class DistillationLoss(nn.Module):
    """Base of all losses: ``ce_weight * cross_entropy + warmup(epoch) * (the method's own terms)``.

    A subclass defines :meth:`terms` and, if needed, :meth:`statistics` and :meth:`connect`. It is a data class:
    annotated attributes are arguments of its constructor, with the range that the annotation states
    (:mod:`~rld_lightning.losses.ranges`); create learnable parts in ``__post_init__``::

        @register_loss("mse")
        class MSELoss(DistillationLoss):
            weight: Weight = 0.5

            def terms(self, step: StepContext) -> dict[str, Tensor]:
                return {"mse": self.weight * F.mse_loss(step.student.logits, step.teacher.logits)}

    The training step calls it with a :class:`StepContext`; in your own loop, call it directly::

        terms = RLDLoss()(student_logits, teacher_logits, label)
        sum(terms.values()).backward()

    Args:
        ce_weight: weight of the plain cross-entropy with the labels; 0 disables it (it is then not computed).
        warmup_epochs: the method's own terms are multiplied by ``min(epoch / warmup_epochs, 1)``, epochs counted
            from 1, constant within an epoch; 1 is no warm-up.
        ignore_index: label of samples to ignore.
        label_smoothing: share of the label that the cross-entropy spreads over all classes (Szegedy et al., CVPR 2016,
            arXiv 1512.00567). It only affects the cross-entropy: the method's own terms use the unsmoothed label.

    Attributes:
        method: name of the method, for tables.
        papers: sources: arXiv numbers, or the venue if a paper is not there.
        own_recipe: the recipe of the authors' code on CIFAR-100, if it is not the usual one.
        needs_teacher: whether the loss uses a teacher.
        takes_mixtures: whether it can be computed twice for one forward pass, once for each label of mixed images
            (mixup).
        needs_strong_view: whether it uses a second, strongly augmented view of each image.
        of_whole_batch: whether a batch's value differs from the mean of its parts' (of equal size), because samples are
            compared, or some of them averaged: each process, and each accumulated batch, has its own.
        reuses_classifier: whether the student is trained to end in the teacher's classifier, see
            :func:`~rld_lightning.models.graft`.
        student_taps: tap paths of the student's features that it uses.
        teacher_taps: those of the teacher.
        own_buffers: names of buffers that the loss itself synchronises over all processes.

    Raises:
        ValueError: a hyper-parameter outside its range, or one that has no effect.
    """

    method: ClassVar[str] = ""
    papers: ClassVar[tuple[str, ...]] = ()
    own_recipe: ClassVar[str] = ""

    needs_teacher: bool = field(default=True, init=False)
    takes_mixtures: bool = field(default=True, init=False)
    needs_strong_view: bool = field(default=False, init=False)
    of_whole_batch: bool = field(default=False, init=False)
    reuses_classifier: bool = field(default=False, init=False)
    student_taps: Sequence[str] = field(default=(), init=False)
    teacher_taps: Sequence[str] = field(default=(), init=False)
    own_buffers: tuple[str, ...] = field(default=(), init=False)

    _: KW_ONLY
    ce_weight: Weight = 1.0
    warmup_epochs: Epochs = 1
    ignore_index: int = -100
    label_smoothing: Smoothing = 0.0

    def __post_init__(self) -> None:
        super().__init__()
        annotations: dict[str, Any] = {}
        for cls in reversed(type(self).__mro__):
            if is_dataclass(cls):
                annotations |= inspect.get_annotations(cls, eval_str=True)
        check_ranges(ranges_of(annotations), vars(self))
        if self.label_smoothing and not self.ce_weight:
            raise ValueError(
                f"label_smoothing={self.label_smoothing!r} applies to the cross-entropy, which ce_weight=0 removes; "
                "set ce_weight=1, say, or label_smoothing=0."
            )

    def connect(
        self, student: nn.Module, teacher: nn.Module | None, image_shape: Sequence[int], train_label: Tensor
    ) -> None:
        """Chooses the taps and builds learnable parts that depend on the networks, if the loss has any.

        Call it once, before the optimiser is made, the loss is moved to its device, or a checkpoint is loaded.

        Args:
            student: the network that is trained.
            teacher: the frozen network; ``None`` if there is none.
            image_shape: channels, height and width of the images.
            train_label: ``(N,)`` class of each training image, for losses with a memory.

        Raises:
            ValueError: the loss cannot work with these networks.
        """

    def terms(self, step: StepContext) -> dict[str, Tensor]:
        """The method's own scalar terms by name, weighted, without warm-up."""
        raise NotImplementedError(f"{type(self).__name__} must define terms(step).")

    def statistics(self, step: StepContext) -> dict[str, Tensor]:
        """Scalars to monitor, not to minimise (percent or nats), by name; called without gradient."""
        return {}

    def refined(self, teacher: Tensor, label: Tensor) -> Tensor | None:
        """The teacher's logits as the method distils them, for inspection.

        Args:
            teacher: the teacher's logits ``(N, C)``.
            label: ``(N,)``.

        Returns:
            ``(N, C)``, -inf for masked classes; ``None`` for methods that distil them unchanged.
        """
        return None

    def warmup(self, epoch: int | None) -> float:
        """Factor on the method's own terms at an epoch counted from 1."""
        return 1.0 if epoch is None else min(epoch / self.warmup_epochs, 1.0)

    def forward(
        self, student: StepContext | Tensor, teacher: Tensor | None = None, label: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Named terms whose sum is to be minimised.

        Args:
            student: the whole context of a step, or the student's logits ``(B, C)`` or ``(B, C, *)``.
            teacher: the teacher's logits, when the first argument is a tensor.
            label: ``(B,)`` or ``(B, *)``, when the first argument is a tensor.

        Returns:
            ``"ce"`` (when its weight is not 0) and the method's own terms, scalars in nats, with weights and warm-up.
        """
        step = student if isinstance(student, StepContext) else _context(student, teacher, label)
        if self.needs_teacher and step.teacher is None:
            raise ValueError(f"{type(self).__name__} needs the teacher's logits; pass them, or use CELoss.")
        # Half precision loses what distillation is about: the small probabilities.
        with torch.autocast(step.label.device.type, enabled=False):
            # First, because what it says about a label that does not fit is clearer than what cross-entropy says.
            method = self.terms(step)
            terms = {}
            if self.ce_weight:
                terms["ce"] = self.ce_weight * self.cross_entropy(step.student.logits, step.label)
            factor = self.warmup(step.epoch)
            terms |= {name: factor * term if factor != 1.0 else term for name, term in method.items()}
        return terms

    def cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        """That of :func:`cross_entropy`, with this loss's smoothing of labels."""
        return cross_entropy(logits, label, self.ignore_index, self.label_smoothing)

    def describe(self) -> str:
        """One line for the console: what differs from the defaults, and how much there is to learn."""
        own = {option.name: (getattr(self, option.name), option.default) for option in fields(self) if option.init}
        changed = {name: value for name, (value, default) in own.items() if value != default}
        values = ", ".join(f"{key}={value}" for key, value in changed.items()) or "all by default"
        learnable = sum(parameter.numel() for parameter in self.parameters())
        return f"{type(self).__name__}({values})" + (f", {learnable:,} parameters" if learnable else "")

    def extra_repr(self) -> str:
        """All hyper-parameters, so that ``print(loss)`` tells what is minimised."""
        return ", ".join(f"{k}={v}" for k, v in vars(self).items() if not k.startswith("_") and k != "training")


class LogitLoss(DistillationLoss):
    """Base of the methods that are a function of both logits and the labels.

    A subclass names its function and declares each of its hyper-parameters under the same name::

        @register_loss("kd")
        class KDLoss(LogitLoss):
            function = staticmethod(kd_loss)

            temperature: Positive = 4.0
            weight: Weight = 0.9
            logit_standardization: bool = False

    Attributes:
        function: ``(student_logits, teacher_logits, label, *, <hyper-parameters>)`` to named terms, weights on.
    """

    function: ClassVar[Callable[..., dict[str, Tensor]]]
    _hyper_parameters: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        parameters = inspect.signature(cls.function).parameters.values()
        cls._hyper_parameters = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "reduction")

    def terms(self, step: StepContext) -> dict[str, Tensor]:
        """The function's terms, with this module's hyper-parameters."""
        options = {name: getattr(self, name) for name in self._hyper_parameters}
        return type(self).function(step.student.logits, step.teacher_logits, step.label, **options)


def cross_entropy(logits: Tensor, label: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of ``(B, C)`` or ``(B, C, *)`` logits, in float32 or better; 0 if every label is ignored."""
    shape = torch.Size((*logits.shape[:1], *logits.shape[2:]))
    if label.is_floating_point() or label.dtype == torch.bool or label.shape != shape:
        raise ValueError(
            f"label must hold class indices (integers) of shape {tuple(shape)} for logits of shape "
            f"{tuple(logits.shape)}, got {label.dtype} {tuple(label.shape)}"
            f"{way_out_for_label(label, shape, logits.shape)}."
        )
    dtype, label = torch.promote_types(logits.dtype, torch.float32), label.long()
    if label.device.type == "cpu":  # elsewhere cross-entropy looks by itself
        check_labels(torch.where(label != ignore_index, label, 0), logits.shape[1], ignore_index)
    total = F.cross_entropy(
        logits.to(dtype), label, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (label != ignore_index).sum().clamp(min=1)


def _context(student: Tensor, teacher: Tensor | None, label: Tensor | None) -> StepContext:
    if label is None:
        raise ValueError("call the loss with (student_logits, teacher_logits, label) or with a StepContext.")
    for name, value in (("student_logits", student), ("teacher_logits", teacher), ("label", label)):
        if value is not None:
            check_tensor(name, value)
    return StepContext(ModelOutput(student), None if teacher is None else ModelOutput(teacher), label)
