"""Checks a batch of logits, flattens it to rows (one distribution each), computes losses per row and reduces them."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, NamedTuple, ParamSpec, cast

import torch
from torch import Tensor

from rld_lightning.losses.numerics import bounded, standardize
from rld_lightning.losses.ranges import check_ranges, ranges_of
from rld_lightning.mps import lacks, widest_float

P = ParamSpec("P")

Reduction = Literal["mean", "sum", "none"]
COMMON_KEYWORDS = ("logit_standardization", "ignore_index", "reduction")
RowTerms = dict[str, tuple[float, Tensor]]
"""Terms by name: the term's weight and its loss of each row ``(n,)``."""


class LogitRows(NamedTuple):
    """Checked logits, one distribution per row.

    Attributes:
        student: ``(N, C)``, float32 or float64, carries the gradient; ignored rows are 0.
        teacher: ``(N, C)``, the same type, detached.
        label: ``(N,)`` int64 in ``[0, C)``; 0 for ignored rows. ``None`` for methods that do not use labels.
        valid: ``(N,)`` bool, False if the label is ``ignore_index``. ``None`` if there are no labels.
        shape: shape of a per-sample result: ``(B, *)``.
    """

    student: Tensor
    teacher: Tensor
    label: Tensor | None
    valid: Tensor | None
    shape: torch.Size

    def zeroed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns student and teacher with ignored rows set to 0, and the ``(N,)`` bool mask of the rows not ignored.

        For losses that compare samples: the values of an ignored sample must not affect products or gradients.
        """
        valid = torch.ones_like(self.student[:, 0], dtype=torch.bool) if self.valid is None else self.valid
        student, teacher = (logits.masked_fill(~valid.unsqueeze(-1), 0.0) for logits in (self.student, self.teacher))
        return student, teacher, valid

    def reduce(self, per_row: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Reduces ``(*, N)`` losses along the rows like ``torch.nn.functional.cross_entropy``, without ignored rows.

        ``"mean"`` divides by the number of rows that are not ignored (0 if there are none); ``"none"`` returns
        ``(*, B, *)`` with zeros for ignored samples.
        """
        valid = _none_if_all(self.valid)
        if valid is not None:
            per_row = torch.where(valid, per_row, 0.0)
        if reduction == "none":
            return per_row.unflatten(-1, self.shape)
        if reduction == "sum":
            return per_row.sum(-1)
        if valid is None and per_row.numel():
            return per_row.mean(-1)
        return per_row.sum(-1) / (1 if valid is None else valid.sum().clamp(min=1))


def logit_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
) -> LogitRows:
    """Checks a batch and returns its rows, ready for computation.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; detached here, so that no method sends a gradient into the teacher.
        label: ``(B,)`` or ``(B, *)`` integers.
        logit_standardization: z-score each row of both first, see :func:`~rld_lightning.losses.numerics.standardize`.
        ignore_index: label of the samples to ignore.
        temperature: the largest temperature of the method. Above 100, rows are float64 if the device supports it: the
            distributions are nearly uniform, float32 rounds off their difference, and T^2 amplifies the error.

    Raises:
        ValueError: invalid shapes, class counts or types, or a label outside ``[0, C)``. Labels on an accelerator are
            checked by an assertion on the device, which needs no synchronisation.
    """
    rows = check_rows(student_logits, teacher_logits, label, ignore_index, temperature)
    student, teacher = prepare_logits(rows.student, rows.teacher, _none_if_all(rows.valid), logit_standardization)
    return rows._replace(student=student, teacher=teacher)


def prepare_logits(
    student: Tensor, teacher: Tensor, valid: Tensor | None, logit_standardization: bool
) -> tuple[Tensor, Tensor]:
    """Makes logits of :func:`check_rows` (all rows or a block) finite and of one type; optionally z-scores them."""
    if valid is not None:
        # Ignored samples must not affect the gradient: NaN times 0 is NaN.
        student = torch.where(valid.unsqueeze(-1), student, 0.0)
    student, teacher = bounded(student), bounded(teacher.to(student.dtype))
    return (standardize(student), standardize(teacher)) if logit_standardization else (student, teacher)


def _none_if_all(valid: Tensor | None) -> Tensor | None:
    """Returns ``None`` if all rows are valid, else the mask. Not checked on accelerators: it would synchronise."""
    if valid is None or torch.compiler.is_compiling() or valid.device.type != "cpu":
        return valid
    return None if valid.all() else valid


def check_rows(
    student_logits: Tensor, teacher_logits: Tensor, label: Tensor | None, ignore_index: int, temperature: float
) -> LogitRows:
    """Does the checks of :func:`logit_rows`; only the student's logits are already of the type to compute in."""
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
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    if temperature > 100:
        dtype = widest_float(student_logits.device)
    if label is not None:
        check_tensor("label", label)
        check_label_form(label, student_logits)
    rows = flat_rows(student_logits, teacher_logits, label, ignore_index)
    if rows.label is not None:
        check_labels(rows.label, num_classes, ignore_index)
    return rows._replace(student=rows.student.to(dtype))


def flat_rows(student_logits: Tensor, teacher_logits: Tensor, label: Tensor | None, ignore_index: int) -> LogitRows:
    """Flattens what :func:`check_rows` has checked to rows; logits keep their types and ignored rows their values."""
    student, teacher = _flatten_to_rows(student_logits), _flatten_to_rows(teacher_logits.detach())
    shape = _sample_shape(student_logits)
    if label is None:
        return LogitRows(student, teacher, None, None, shape)
    label = label.reshape(-1).long()
    valid = label != ignore_index
    return LogitRows(student, teacher, label * valid, valid, shape)


def _sample_shape(logits: Tensor) -> torch.Size:
    """``(B, C, *)`` -> ``(B, *)``."""
    return torch.Size((logits.shape[0], *logits.shape[2:]))


def _flatten_to_rows(logits: Tensor) -> Tensor:
    """``(B, C, *)`` -> ``(N, C)``; no copy for ``(B, C)``."""
    return logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2)


def check_tensor(name: str, value: object) -> None:
    """Raises ``ValueError`` if an argument is not a tensor."""
    if isinstance(value, Tensor):
        return
    hint = (
        "torch.as_tensor(label)"
        if name == "label"
        else "the logits of a model's output, as in output.logits or output[0]"
    )
    raise ValueError(f"{name} must be a tensor, got a {type(value).__name__}; pass {hint}.")


def check_label_form(label: Tensor, logits: Tensor) -> None:
    """Raises ``ValueError`` unless labels are integers of shape ``(B, *)`` for logits ``(B, C, *)``."""
    shape = _sample_shape(logits)
    if label.shape == shape and not label.is_floating_point() and label.dtype != torch.bool:
        return
    hint = ""
    if label.shape == shape:
        hint = "; use label.long()" if label.is_floating_point() else ""
    elif label.shape == logits.shape:
        hint = "; for soft or one-hot labels use label.argmax(1)"
    elif label.shape == logits.shape[:-1]:
        hint = "; classes are dimension 1 of logits: for (B, L, C) use logits.transpose(1, 2)"
    elif label.shape == (*shape, 1):
        hint = "; use label.squeeze(-1)"
    raise ValueError(
        f"label must hold class indices (integers) of shape {tuple(shape)} for logits of shape {tuple(logits.shape)}, "
        f"got {label.dtype} {tuple(label.shape)}{hint}."
    )


def check_labels(label: Tensor, num_classes: int, ignore_index: int) -> None:
    """Checks that labels (ignored ones removed or set to 0) are in ``[0, C)``.

    Raises:
        ValueError: a label is not. (On an accelerator: an assertion on the device if PyTorch has it there, see
            :func:`logit_rows`.)
    """
    if torch.compiler.is_compiling() or not label.numel():
        return
    in_range = label == label.clamp(0, num_classes - 1)
    if label.device.type != "cpu" and not lacks("_assert_async.msg", label.device):
        # Reading the value would synchronise with the device in every step.
        torch._assert_async(in_range.all(), f"label outside [0, {num_classes}) and not ignore_index={ignore_index}")
    elif not in_range.all():
        wrong = label[~in_range][0].item()
        raise ValueError(
            f"label {wrong} is outside [0, {num_classes}) and is not ignore_index={ignore_index}; "
            "check the number of classes of the model and of the data."
        )


def row_loss(formula: Callable[P, RowTerms]) -> Callable[P, dict[str, Tensor]]:
    """Decorator: turns a formula of rows into a loss of batches.

    The formula declares all arguments of the loss::

        @row_loss
        def kd_loss(
            student_logits: Tensor,
            teacher_logits: Tensor,
            label: Tensor | None = None,
            *,
            temperature: Positive,  # and the method's other hyper-parameters
            logit_standardization: bool = False,
            ignore_index: int = -100,
            reduction: Reduction = "mean",
        ) -> RowTerms:
            divergence = softmax_kl(teacher_logits / temperature, student_logits / temperature)
            return {"kd": (temperature**2, divergence)}

    The formula receives the rows of a batch, or a block of them: logits ``(n, C)`` in float32 or float64 (the teacher's
    without gradient) and labels ``(n,)`` in ``[0, C)``. The decorator handles the last three keywords. Any
    differentiable operations work; those of :mod:`~rld_lightning.losses.divergences` are fast with many classes.

    Raises:
        ValueError: (the loss) for invalid logits, labels or hyper-parameters.
    """
    signature = inspect.signature(formula, eval_str=True)
    ranges = ranges_of({name: parameter.annotation for name, parameter in signature.parameters.items()})
    common = {name: signature.parameters[name].default for name in COMMON_KEYWORDS}
    row_formula: Callable[..., RowTerms] = formula
    needs_label = signature.parameters["label"].default is inspect.Parameter.empty

    @wraps(formula)
    def loss(student_logits: Tensor, teacher_logits: Tensor, label: Tensor | None = None, **options: Any) -> Any:
        check_ranges(ranges, options)
        if needs_label and label is None:
            raise ValueError(f"{formula.__name__} needs the labels of the samples.")
        standardization, ignore_index, reduction = (options.pop(name, default) for name, default in common.items())
        temperatures = [v for k, v in options.items() if k.endswith("temperature") and v is not None]
        rows = check_rows(student_logits, teacher_logits, label, ignore_index, max(temperatures, default=1.0))
        names: list[str] = []

        def row_losses(
            student: Tensor, teacher: Tensor, label: Tensor | None = None, valid: Tensor | None = None
        ) -> tuple[Tensor, ...]:
            student, teacher = prepare_logits(student, teacher, valid, standardization)
            terms = row_formula(student, teacher, *(() if label is None else (label,)), **options)
            names[:] = terms
            return tuple(weight * loss for weight, loss in terms.values())

        rows = rows._replace(valid=_none_if_all(rows.valid))
        labels = [tensor for tensor in (rows.label, rows.valid) if tensor is not None]
        losses = by_row_blocks(row_losses, rows.student, rows.teacher, *labels, assume_sum=True)
        return {name: rows.reduce(per_row, reduction) for name, per_row in zip(names, losses, strict=True)}

    return cast(Callable[P, dict[str, Tensor]], loss)


# Logits per block (on a CPU, per thread): the block's temporaries fit into the cache (CPU), or are small compared with
# the network's memory (other devices).
BLOCK_ELEMENTS = {"cpu": 2**17, "other": 2**22}


def by_row_blocks(
    row_losses: Callable[..., tuple[Tensor, ...]], student: Tensor, *others: Tensor, assume_sum: bool = False
) -> tuple[Tensor, ...]:
    """Computes ``row_losses(student, *others)``; large inputs in blocks of rows, each with its gradient.

    The losses of rows are independent, so each block's gradient is computed at once instead of keeping a dozen
    ``(N, C)`` temporaries until the backward pass. With many classes this is faster (a block fits into the cache) and
    needs memory for one gradient per loss only (with ``assume_sum`` for one in total). Small inputs, which do not
    profit, are computed directly.

    Args:
        row_losses: maps ``(n, C)`` student rows and the matching rows of ``others`` to a tuple of ``(n,)`` losses.
        student: ``(N, C)``, the only argument that may need a gradient. (Blocks have no second derivative.)
        others: tensors with ``N`` rows.
        assume_sum: expect that the sum of the losses, or a multiple of it for each row, is minimised, and compute its
            gradient alone; if the backward pass finds otherwise, the blocks are computed again. Ignored on
            accelerators, where that check would synchronise: there each loss has its own gradient.
    """
    if torch.compiler.is_compiling():
        return row_losses(student, *others)
    on_cpu = student.device.type == "cpu"
    block = BLOCK_ELEMENTS["cpu"] * torch.get_num_threads() if on_cpu else BLOCK_ELEMENTS["other"]
    if student.numel() <= 4 * block:
        return row_losses(student, *others)
    return _RowBlocks.apply(row_losses, max(1, block // student.shape[1]), assume_sum and on_cpu, student, *others)


class _RowBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        row_losses: Callable[..., tuple[Tensor, ...]],
        size: int,
        of_sum: bool,
        student: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.row_losses, ctx.size, ctx.of_sum = row_losses, size, of_sum
        ctx.save_for_backward(student, *others)
        losses, ctx.gradients = _compute_blocks(row_losses, size, of_sum, ctx.needs_input_grad[3], student, *others)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # ``once_differentiable`` would not raise: the second derivative would silently miss this loss.
        if torch.is_grad_enabled():
            raise RuntimeError("a batch this large has no second derivative (create_graph=True); split the batch.")
        of_sum = ctx.of_sum and all(torch.equal(grad_outputs[0], grad_output) for grad_output in grad_outputs[1:])
        if of_sum != ctx.of_sum or ctx.gradients is None:
            _, ctx.gradients = _compute_blocks(ctx.row_losses, ctx.size, of_sum, True, *ctx.saved_tensors)
        # The gradients are large and overwritten here; another backward pass computes them again.
        (result, *more), ctx.gradients = ctx.gradients, None
        result.mul_(grad_outputs[0].unsqueeze(-1))
        for grad_output, gradient in zip(grad_outputs[1:], more, strict=False):
            result.addcmul_(grad_output.unsqueeze(-1), gradient)
        return None, None, None, result, *(None for _ in ctx.needs_input_grad[4:])


def _compute_blocks(
    row_losses: Callable[..., tuple[Tensor, ...]], size: int, of_sum: bool, differentiate: bool, *inputs: Tensor
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Returns the losses of all rows and their gradients ``(N, C)``, or only the gradient of their sum (``of_sum``)."""
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
            sums = [losses] if of_sum else [(loss,) for loss in losses]
            gradients = gradients or [torch.empty_like(student) for _ in sums]
            for i, (summands, gradient) in enumerate(zip(sums, gradients, strict=True), start=1):
                ones = [torch.ones_like(loss) for loss in summands]
                (gradient[rows],) = torch.autograd.grad(summands, leaf, ones, retain_graph=i < len(sums))
    return tuple(torch.cat(parts) for parts in zip(*values, strict=True)), gradients
