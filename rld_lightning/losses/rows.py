"""From a batch of logits to rows, one distribution each, and back: checks, blocks of rows, reduction."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, NamedTuple, ParamSpec, cast

import torch
from torch import Tensor

from rld_lightning.losses.given import check_tensor, way_out_for_label
from rld_lightning.losses.numerics import bounded, standardize
from rld_lightning.losses.ranges import check_ranges, ranges_of

P = ParamSpec("P")

Reduction = Literal["mean", "sum", "none"]
COMMON_KEYWORDS = ("logit_standardization", "ignore_index", "reduction")
RowTerms = dict[str, tuple[float, Tensor]]
"""By the name of a term, its weight and its loss of each row, ``(n,)``."""


class LogitRows(NamedTuple):
    """Checked logits, one distribution a row.

    Attributes:
        student: ``(N, C)``, float32 or float64, carries the gradient; rows to ignore hold 0.
        teacher: ``(N, C)``, the same type, detached.
        label: ``(N,)`` int64 in ``[0, C)``; rows to ignore hold 0. ``None`` for methods that do not use labels.
        valid: ``(N,)`` bool, False where the label is ``ignore_index``. ``None`` when there are no labels.
        shape: what a per-sample result is reshaped to: ``(B, *)``.
    """

    student: Tensor
    teacher: Tensor
    label: Tensor | None
    valid: Tensor | None
    shape: torch.Size

    def zeroed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Student and teacher with zeros in ignored rows, and which rows count, ``(N,)`` bool.

        For losses of the whole batch: whatever an ignored sample holds, neither products nor gradients may meet it.
        """
        valid = torch.ones_like(self.student[:, 0], dtype=torch.bool) if self.valid is None else self.valid
        student, teacher = (logits.masked_fill(~valid.unsqueeze(-1), 0.0) for logits in (self.student, self.teacher))
        return student, teacher, valid

    def reduce(self, per_row: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Reduces ``(N,)`` losses as ``torch.nn.functional.cross_entropy`` does; ignored rows count for nothing.

        ``"mean"`` divides by the number of rows that are not ignored (a batch without any gives 0), ``"none"`` returns
        ``(B, *)`` with zeros at ignored places.
        """
        if self.valid is not None:
            per_row = torch.where(self.valid, per_row, 0.0)
        if reduction == "none":
            return per_row.reshape(self.shape)
        total = per_row.sum()
        if reduction == "sum":
            return total
        return total / (self.valid.sum().clamp(min=1) if self.valid is not None else max(per_row.numel(), 1))


def logit_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> LogitRows:
    """Checks a batch and turns it into rows that can be calculated with.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; detached here, so no method can send a gradient into the teacher.
        label: ``(B,)`` or ``(B, *)`` integers.
        logit_standardization: z-score each row of both first, see :func:`~rld_lightning.losses.numerics.standardize`.
        ignore_index: label of the samples that count for nothing.
        temperature: the largest that they will be divided by. Above 100 rows are float64, where the device has it:
            nearly uniform distributions differ by less than float32 can tell, and T^2 makes much of it.

    Raises:
        ValueError: shapes, class counts or types that do not fit, or a label outside ``[0, C)``. Labels on an
            accelerator are checked by an assertion on the device, which costs no synchronisation.
    """
    rows = checked_rows(student_logits, teacher_logits, label, ignore_index, temperature)
    student, teacher = prepared(rows.student, rows.teacher, _if_any_is_not(rows.valid), logit_standardization)
    return rows._replace(student=student, teacher=teacher)


def prepared(
    student: Tensor, teacher: Tensor, valid: Tensor | None, logit_standardization: bool
) -> tuple[Tensor, Tensor]:
    """Logits of :func:`checked_rows`, or of some of its rows, in one type, finite, and z-scored if so wished."""
    if valid is not None:
        # No gradient comes out of what an ignored sample holds: not even NaN times 0.
        student = student.masked_fill(~valid.unsqueeze(-1), 0.0)
    student, teacher = bounded(student), bounded(teacher.to(student.dtype))
    return (standardize(student), standardize(teacher)) if logit_standardization else (student, teacher)


def _if_any_is_not(valid: Tensor | None) -> Tensor | None:
    """The same, or ``None`` if all samples count. An accelerator is not asked, for that would make it wait."""
    if valid is None or torch.compiler.is_compiling() or valid.device.type != "cpu":
        return valid
    return None if valid.all() else valid


def checked_rows(
    student_logits: Tensor, teacher_logits: Tensor, label: Tensor | None, ignore_index: int, temperature: float
) -> LogitRows:
    """The checks of :func:`logit_rows`; the student's logits are in the type to compute in, the rest is as it came."""
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        check_tensor(name, logits)
        if logits.ndim < 2 or not logits.is_floating_point():
            raise ValueError(
                f"{name} must be floating point of shape (B, C) or (B, C, *), got {logits.dtype} {tuple(logits.shape)}."
            )
    if student_logits.shape[1] != teacher_logits.shape[1]:
        raise ValueError(
            f"the student has {student_logits.shape[1]} classes and the teacher {teacher_logits.shape[1]}; "
            "give both models the same num_classes."
        )
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} "
            "must have the same shape."
        )
    num_classes = student_logits.shape[1]
    if num_classes < 2:
        raise ValueError(f"logits need at least 2 classes in dimension 1, got shape {tuple(student_logits.shape)}.")
    shape = torch.Size((student_logits.shape[0], *student_logits.shape[2:]))

    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    if temperature > 100 and student_logits.device.type != "mps":
        dtype = torch.float64
    student, teacher = _classes_last(student_logits).to(dtype), _classes_last(teacher_logits.detach())
    if label is None:
        return LogitRows(student, teacher, None, None, shape)
    check_tensor("label", label)
    if label.shape != shape or label.is_floating_point() or label.dtype == torch.bool:
        raise ValueError(
            f"label must hold class indices (integers) of shape {tuple(shape)} for logits of shape "
            f"{tuple(student_logits.shape)}, got {label.dtype} {tuple(label.shape)}"
            f"{way_out_for_label(label, shape, student_logits.shape)}."
        )
    label = label.reshape(-1).long()
    valid = label != ignore_index
    of_rows = torch.where(valid, label, 0)
    check_labels(of_rows, num_classes, ignore_index)
    return LogitRows(student, teacher, of_rows, valid, shape)


def _classes_last(logits: Tensor) -> Tensor:
    """``(B, C, *)`` -> ``(N, C)``; free for ``(B, C)``."""
    return logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2)


def check_labels(label: Tensor, num_classes: int, ignore_index: int) -> None:
    """Looks whether labels, those that are ignored left out or 0, are in ``[0, C)``; as :func:`logit_rows` says.

    Raises:
        ValueError: one is not.
    """
    if torch.compiler.is_compiling() or not label.numel():
        return
    lowest, highest = label.aminmax()
    if label.device.type != "cpu":
        # Reading the value would make every step wait for the device.
        in_range = (lowest >= 0) & (highest < num_classes)
        torch._assert_async(in_range, f"label outside [0, {num_classes}) and not ignore_index={ignore_index}")
    elif lowest < 0 or highest >= num_classes:
        wrong = label[(label < 0) | (label >= num_classes)][0].item()
        raise ValueError(
            f"label {wrong} is outside [0, {num_classes}) and is not ignore_index={ignore_index}; "
            "check the number of classes of the model and of the data."
        )


def row_loss(formula: Callable[P, RowTerms]) -> Callable[P, dict[str, Tensor]]:
    """Decorator: makes a loss of batches from the formula of its rows.

    The formula is declared with everything that the loss takes::

        @row_loss
        def kd_loss(
            student_logits: Tensor,
            teacher_logits: Tensor,
            label: Tensor | None = None,
            *,
            temperature: Positive,  # and whatever else the method has
            logit_standardization: bool = False,
            ignore_index: int = -100,
            reduction: Reduction = "mean",
        ) -> RowTerms:
            divergence = softmax_kl(teacher_logits / temperature, student_logits / temperature)
            return {"kd": (temperature**2, divergence)}

    Any differentiable tensors do; those of :mod:`~rld_lightning.losses.divergences` are fast with many classes.
    It is given rows, some or all of a batch: logits ``(n, C)`` in float32 or float64, those of the teacher without
    gradient, and labels ``(n,)`` in ``[0, C)``. The last three keywords are none of its business.

    Raises:
        ValueError: by the loss, for logits, labels or hyper-parameters that do not fit.
    """
    signature = inspect.signature(formula, eval_str=True)
    ranges = ranges_of({name: parameter.annotation for name, parameter in signature.parameters.items()})
    common = {name: signature.parameters[name].default for name in COMMON_KEYWORDS}
    rows_of: Callable[..., RowTerms] = formula
    needs_label = signature.parameters["label"].default is inspect.Parameter.empty

    @wraps(formula)
    def loss(student_logits: Tensor, teacher_logits: Tensor, label: Tensor | None = None, **options: Any) -> Any:
        check_ranges(ranges, options)
        if needs_label and label is None:
            raise ValueError(f"{formula.__name__} needs the labels of the samples.")
        standardization, ignore_index, reduction = (options.pop(name, default) for name, default in common.items())
        temperatures = [v for k, v in options.items() if k.endswith("temperature") and v is not None]
        rows = checked_rows(student_logits, teacher_logits, label, ignore_index, max(temperatures, default=1.0))
        names: list[str] = []

        def row_losses(
            student: Tensor, teacher: Tensor, label: Tensor | None = None, valid: Tensor | None = None
        ) -> tuple[Tensor, ...]:
            student, teacher = prepared(student, teacher, valid, standardization)
            terms = rows_of(student, teacher, *(() if label is None else (label,)), **options)
            names[:] = terms
            return tuple(weight * loss for weight, loss in terms.values())

        rows = rows._replace(valid=_if_any_is_not(rows.valid))
        labels = [tensor for tensor in (rows.label, rows.valid) if tensor is not None]
        losses = by_row_blocks(row_losses, rows.student, rows.teacher, *labels, alike=True)
        return {name: rows.reduce(per_row, reduction) for name, per_row in zip(names, losses, strict=True)}

    return cast(Callable[P, dict[str, Tensor]], loss)


# Logits in a block, for each thread: its temporaries stay in the cache (CPU) or are few beside the weights (others).
BLOCK_ELEMENTS = {"cpu": 2**17, "other": 2**22}


def by_row_blocks(
    row_losses: Callable[..., tuple[Tensor, ...]], student: Tensor, *others: Tensor, alike: bool = False
) -> tuple[Tensor, ...]:
    """``row_losses(student, *others)`` of large inputs a block of rows at a time, with the gradient in the same sweep.

    Losses of rows are independent, so each block's gradient can be taken at once instead of keeping its dozen
    ``(N, C)`` temporaries until the backward pass: with many classes that is faster (a block stays in the cache) and
    takes memory for one gradient a loss, or for a single one. Small inputs, where this would not pay, go straight
    through.

    Args:
        row_losses: maps ``(n, C)`` student rows and the matching rows of ``others`` to a tuple of ``(n,)`` losses.
        student: ``(N, C)``, the only argument that may need a gradient (a second derivative needs the direct way).
        others: tensors with ``N`` rows.
        alike: what is minimised is most likely the sum of the losses, or a multiple of it for each row, so that one
            gradient will do; where that turns out wrong, the sweep is done again. To find out costs an accelerator a
            wait, which is why there each loss still has its own.
    """
    if torch.compiler.is_compiling():
        return row_losses(student, *others)
    on_cpu = student.device.type == "cpu"
    block = BLOCK_ELEMENTS["cpu"] * torch.get_num_threads() if on_cpu else BLOCK_ELEMENTS["other"]
    if student.numel() <= 4 * block:
        return row_losses(student, *others)
    return _RowBlocks.apply(row_losses, max(1, block // student.shape[1]), alike and on_cpu, student, *others)


class _RowBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        row_losses: Callable[..., tuple[Tensor, ...]],
        size: int,
        alike: bool,
        student: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.row_losses, ctx.size, ctx.alike = row_losses, size, alike
        ctx.save_for_backward(student, *others)
        losses, ctx.gradients = _sweep(row_losses, size, alike, ctx.needs_input_grad[3], student, *others)
        return losses

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        # ``once_differentiable`` would let this pass, and the second derivative would silently be without this loss.
        if torch.is_grad_enabled():
            raise RuntimeError("a batch this large has no second derivative (create_graph=True); split the batch.")
        alike = ctx.alike and all(torch.equal(outer[0], weight) for weight in outer[1:])
        if alike != ctx.alike or ctx.gradients is None:
            _, ctx.gradients = _sweep(ctx.row_losses, ctx.size, alike, True, *ctx.saved_tensors)
        # They are large and used up here; who asks for them again pays for another sweep.
        (result, *more), ctx.gradients = ctx.gradients, None
        result.mul_(outer[0].unsqueeze(-1))
        for weight, gradient in zip(outer[1:], more, strict=False):
            result.addcmul_(weight.unsqueeze(-1), gradient)
        return None, None, None, result, *(None for _ in ctx.needs_input_grad[4:])


def _sweep(
    row_losses: Callable[..., tuple[Tensor, ...]], size: int, alike: bool, differentiate: bool, *inputs: Tensor
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The losses of all rows, and their gradients ``(N, C)``: of the sum alone where they are alike."""
    student, *others = inputs
    values: list[tuple[Tensor, ...]] = []
    gradients: list[Tensor] = []
    for start in range(0, len(student), size):
        rows = slice(start, start + size)
        leaf = student[rows].detach().requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            losses = row_losses(leaf, *(other[rows] for other in others))
        values.append(tuple(loss.detach() for loss in losses))
        if differentiate:
            sums = [losses] if alike else [(loss,) for loss in losses]
            gradients = gradients or [torch.empty_like(student) for _ in sums]
            for i, (summands, gradient) in enumerate(zip(sums, gradients, strict=True), start=1):
                ones = [torch.ones_like(loss) for loss in summands]
                (gradient[rows],) = torch.autograd.grad(summands, leaf, ones, retain_graph=i < len(sums))
    return tuple(torch.cat(parts) for parts in zip(*values, strict=True)), gradients
