"""Base classes of the distillation losses: inputs of a step, cross-entropy and warm-up."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rld_lightning.losses.ranges import Weight, check_ranges, must_be, ranges_of
from rld_lightning.losses.rows import check_label_form, check_labels, check_tensor

Smoothing = Annotated[float, must_be("in [0, 1) (0 switches it off)", lambda share: 0 <= share < 1)]
Epochs = Annotated[int, must_be(">= 1 (1 is no warm-up)", lambda epochs: epochs >= 1)]


@dataclass(frozen=True)
class ModelOutput:
    """The output of a forward pass.

    Attributes:
        logits: ``(B, C)`` or ``(B, C, *)``.
        features: intermediate tensors by tap path; only those that the loss requests.
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
        epoch: the epoch counted from 1, for warm-up; ``None`` if the warm-up is over.
        student_strong: the student's output for the strongly augmented view of the same images; only for losses that
            need one.
        teacher_strong: the teacher's output for that view.
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
        """The teacher's logits. Only for losses that need a teacher: they are never called without one."""
        assert self.teacher is not None
        return self.teacher.logits


@dataclass(eq=False, repr=False)
class DistillationLoss(nn.Module):
    """Base of all losses: ``ce_weight * cross_entropy + warmup(epoch) * (the method's terms)``.

    A subclass defines :meth:`terms` and, if needed, :meth:`statistics` and :meth:`connect`. It is a dataclass: its
    annotated attributes are arguments of its constructor, with the range that the annotation states
    (:mod:`~rld_lightning.losses.ranges`). Create learnable parts in ``__post_init__``::

        @register_loss("mse")
        class MSELoss(DistillationLoss):
            weight: Weight = 0.5

            def terms(self, step: StepContext) -> dict[str, Tensor]:
                return {"mse": self.weight * F.mse_loss(step.student.logits, step.teacher.logits)}

    The training step calls it with a :class:`StepContext`; in your own loop, call it directly::

        terms = RLDLoss()(student_logits, teacher_logits, label)
        sum(terms.values()).backward()

    Args:
        ce_weight: weight of the plain cross-entropy with the labels; if 0, it is not computed.
        warmup_epochs: the method's terms are multiplied by ``min(epoch / warmup_epochs, 1)``, with epochs counted
            from 1; constant within an epoch. 1 disables the warm-up.
        ignore_index: label of samples to ignore.
        label_smoothing: share of the label that the cross-entropy spreads over all classes (Szegedy et al., CVPR 2016,
            arXiv 1512.00567). The method's terms use the unsmoothed label.

    Attributes:
        method: name of the method, for tables.
        papers: sources: arXiv numbers, or the venue of papers that are not on arXiv.
        function: the method's function of tensors, if it has one; its keyword-only parameters are hyper-parameters.
        own_recipe: the recipe of the authors' code on CIFAR-100, if it differs from the usual one.
        needs_teacher: whether the loss uses a teacher.
        takes_mixtures: whether it can be computed twice for one forward pass, once for each label of mixed images
            (mixup).
        needs_strong_view: whether it uses a second, strongly augmented view of each image.
        of_whole_batch: whether a batch's value differs from the mean over its (equally large) parts, because samples
            are compared with each other or a mean is over a subset. It is computed per process and per accumulated
            batch.
        reuses_classifier: whether the trained student ends in the teacher's classifier, see
            :func:`~rld_lightning.models.graft`.
        student_taps: tap paths of the student's features that it uses.
        teacher_taps: tap paths of the teacher's features that it uses.
        own_buffers: names of the buffers that the loss keeps equal on all processes without DDP's broadcast.

    Raises:
        ValueError: a hyper-parameter is outside its range or has no effect.
    """

    method: ClassVar[str] = ""
    papers: ClassVar[tuple[str, ...]] = ()
    own_recipe: ClassVar[str] = ""

    function: ClassVar[Callable[..., dict[str, Tensor]]]
    _hyper_parameters: ClassVar[tuple[str, ...]]

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

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "function"):
            keywords = [p for p in inspect.signature(cls.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
            cls._hyper_parameters = tuple(p.name for p in keywords if p.name != "reduction")

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
        """Chooses the taps and builds the learnable parts that depend on the networks, if any.

        Call it once, before creating the optimiser, moving the loss to its device or loading a checkpoint.

        Args:
            student: the network to train.
            teacher: the frozen network; ``None`` if there is none.
            image_shape: channels, height and width of the images.
            train_label: ``(N,)`` class of each training image, for losses with a memory.

        Raises:
            ValueError: the loss does not support these networks.
        """

    def terms(self, step: StepContext) -> dict[str, Tensor]:
        """Returns the method's scalar terms by name, weighted, without warm-up."""
        raise NotImplementedError(f"{type(self).__name__} must define terms(step).")

    def call_function(self, *inputs: Any, **overrides: Any) -> dict[str, Tensor]:
        """Calls the class's :attr:`function` with this module's hyper-parameters, except for the overrides."""
        options = {name: getattr(self, name) for name in self._hyper_parameters} | overrides
        return type(self).function(*inputs, **options)

    def statistics(self, step: StepContext) -> dict[str, Tensor]:
        """Returns scalars to monitor, not to minimise (percent or nats), by name; called without gradient."""
        return {}

    def refined(self, teacher: Tensor, label: Tensor) -> Tensor | None:
        """Returns the teacher's logits as the method distils them, for inspection.

        Args:
            teacher: the teacher's logits ``(N, C)``.
            label: ``(N,)``.

        Returns:
            ``(N, C)``, -inf for masked classes; ``None`` if the method distils them unchanged.
        """
        return None

    def warmup(self, epoch: int | None) -> float:
        """Returns the factor on the method's terms at an epoch counted from 1."""
        return 1.0 if epoch is None else min(epoch / self.warmup_epochs, 1.0)

    def forward(
        self, student: StepContext | Tensor, teacher: Tensor | None = None, label: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Computes the named terms whose sum is minimised.

        Args:
            student: the context of a step, or the student's logits ``(B, C)`` or ``(B, C, *)``.
            teacher: the teacher's logits, when the first argument is a tensor.
            label: ``(B,)`` or ``(B, *)``, when the first argument is a tensor.

        Returns:
            ``"ce"`` (if its weight is not 0) and the method's terms, scalars in nats, with weights and warm-up.
        """
        step = student if isinstance(student, StepContext) else _step_context(student, teacher, label)
        if self.needs_teacher and step.teacher is None:
            raise ValueError(f"{type(self).__name__} needs the teacher's logits; pass them, or use CELoss.")
        # Half precision loses the small probabilities, which carry the teacher's knowledge.
        with torch.autocast(step.label.device.type, enabled=False):
            # Before the cross-entropy, because its error messages for invalid labels are clearer.
            method_terms = self.terms(step)
            terms = {}
            if self.ce_weight:
                terms["ce"] = _scaled(self.ce_weight, self.cross_entropy(step.student.logits, step.label))
            factor = self.warmup(step.epoch)
            terms |= {name: _scaled(factor, term) for name, term in method_terms.items()}
        return terms

    def cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        """Computes :func:`cross_entropy` with this loss's ``ignore_index`` and label smoothing."""
        return cross_entropy(logits, label, self.ignore_index, self.label_smoothing)

    def describe(self) -> str:
        """Returns a line for the console: the options that differ from the defaults and the number of parameters."""
        options = {option.name: (getattr(self, option.name), option.default) for option in fields(self) if option.init}
        changed = {name: value for name, (value, default) in options.items() if value != default}
        values = ", ".join(f"{key}={value}" for key, value in changed.items()) or "all by default"
        learnable = sum(parameter.numel() for parameter in self.parameters())
        return f"{type(self).__name__}({values})" + (f", {learnable:,} parameters" if learnable else "")

    def extra_repr(self) -> str:
        """Returns all hyper-parameters, for ``print(loss)``."""
        return ", ".join(f"{k}={v}" for k, v in vars(self).items() if not k.startswith("_") and k != "training")


class LogitLoss(DistillationLoss):
    """Base of the methods that are a function of both networks' logits and the labels.

    A subclass sets its function and declares each of the function's hyper-parameters under the same name::

        @register_loss("kd")
        class KDLoss(LogitLoss):
            function = staticmethod(kd_loss)

            temperature: Positive = 4.0
            weight: Weight = 0.9
            logit_standardization: bool = False

    The function maps ``(student_logits, teacher_logits, label, *, <hyper-parameters>)`` to named, weighted terms.

    Raises:
        TypeError: the class has no function.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(self, "function") and type(self).terms is LogitLoss.terms:
            raise TypeError(
                f"{type(self).__name__} has no function: add function = staticmethod(my_loss), a function of logits "
                "and labels, or derive it from DistillationLoss and define terms."
            )

    def terms(self, step: StepContext) -> dict[str, Tensor]:
        """Returns the terms of the function."""
        return self.call_function(step.student.logits, step.teacher_logits, step.label)


def cross_entropy(logits: Tensor, label: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0) -> Tensor:
    """Computes the mean cross-entropy of ``(B, C)`` or ``(B, C, *)`` logits in float32 or better.

    It is 0 if every label is ignored.
    """
    check_label_form(label, logits)
    dtype, label = torch.promote_types(logits.dtype, torch.float32), label.long()
    valid = label != ignore_index
    try:
        total = F.cross_entropy(
            logits.to(dtype), label, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
        )
    except IndexError:  # on a CPU; on other devices, it is an assertion
        check_labels(label * valid, logits.shape[1], ignore_index)
        raise
    return total / valid.sum().clamp(min=1)


def _scaled(factor: float, term: Tensor) -> Tensor:
    return term if factor == 1.0 else factor * term  # a small network's step counts in operations


def _step_context(student: Tensor, teacher: Tensor | None, label: Tensor | None) -> StepContext:
    if label is None:
        raise ValueError("call the loss with (student_logits, teacher_logits, label) or with a StepContext.")
    for name, value in (("student_logits", student), ("teacher_logits", teacher), ("label", label)):
        if value is not None:
            check_tensor(name, value)
    return StepContext(ModelOutput(student), None if teacher is None else ModelOutput(teacher), label)
