"""Pieces that the logit methods share: input checks, log-space divergences, reduction.

Everything here works on rows: logits ``(N, C)``, one distribution a row, in float32 or float64. :func:`logit_rows`
is the
door: it brings ``(B, C)`` and ``(B, C, *)`` logits of any floating type into that form.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


class LogitRows(NamedTuple):
    """Checked logits, one distribution a row.

    Attributes:
        student: ``(N, C)``, float32 or float64, carries the gradient.
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

    def reduce(self, per_row: Tensor, reduction: str) -> Tensor:
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
    ignore_index: int = -100,
    reduction: str = "mean",
    logit_standardization: bool = False,
) -> LogitRows:
    """Checks a batch and turns it into rows.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; detached here, so no method can send a gradient into the teacher.
        label: ``(B,)`` or ``(B, *)`` integers.
        ignore_index: label of the samples that count for nothing.
        reduction: checked here so that a typo fails before any work.
        logit_standardization: z-score each row of both first, see :func:`standardize`.

    Raises:
        ValueError: shapes, class counts or types that do not fit, or a label outside ``[0, C)``. Labels on an
            accelerator are checked by an assertion on the device, which costs no synchronisation.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; choose one of {', '.join(REDUCTIONS)}.")
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
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
    student = _classes_last(student_logits).to(dtype)
    teacher = _classes_last(teacher_logits.detach()).to(dtype)
    if logit_standardization:
        student, teacher = standardize(student), standardize(teacher)

    if label is None:
        return LogitRows(student, teacher, None, None, shape)
    if label.shape != shape or label.is_floating_point() or label.dtype == torch.bool:
        raise ValueError(
            f"label must hold class indices (integers) of shape {tuple(shape)} for logits of shape "
            f"{tuple(student_logits.shape)}, got {label.dtype} {tuple(label.shape)}."
        )
    label = label.reshape(-1).long()
    valid = label != ignore_index
    _check_range(label, valid, num_classes, ignore_index)
    return LogitRows(student, teacher, torch.where(valid, label, 0), valid, shape)


def _classes_last(logits: Tensor) -> Tensor:
    """``(B, C, *)`` -> ``(N, C)``; free for ``(B, C)``."""
    return logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2)


def _check_range(label: Tensor, valid: Tensor, num_classes: int, ignore_index: int) -> None:
    if torch.compiler.is_compiling():
        return
    in_range = (~valid | ((label >= 0) & (label < num_classes))).all()
    if label.device.type != "cpu":
        # Reading the value would make every step wait for the device.
        torch._assert_async(in_range, f"label outside [0, {num_classes}) and not ignore_index={ignore_index}")
    elif not in_range:
        wrong = label[valid & ((label < 0) | (label >= num_classes))][0].item()
        raise ValueError(
            f"label {wrong} is outside [0, {num_classes}) and is not ignore_index={ignore_index}; "
            "check the number of classes of the model and of the data."
        )


def check_positive(**values: float) -> None:
    """Raises ``ValueError`` for the first value that is not a finite number > 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} is not allowed; it must be a finite number > 0.")


def check_weights(**values: float) -> None:
    """Raises ``ValueError`` for the first loss weight that is not a finite number >= 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value!r} is not allowed; it must be a finite number >= 0 (0 switches it off).")


def standardize(logits: Tensor) -> Tensor:
    """Z-scores ``(*, C)`` along the last dimension: ``(x - mean) / (std + 1e-7)``, std with C - 1 in the denominator.

    In float32 or better. Logit standardization (LSKD, arXiv 2403.01427, Algorithm 1). The paper divides by C, its
    published code by C - 1; the code is followed because the published numbers come from it.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)


def kl_rows(teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """``KL(teacher || student)`` of each row of two ``(N, C)`` log-probability tensors, in nats: ``(N,)``."""
    return (teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum(-1)


def softmax_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """``KL( softmax(teacher) || softmax(student) )`` of each row of two ``(N, C)`` logits, in nats: ``(N,)``.

    The logits are already divided by their temperatures.
    """
    return kl_rows(F.log_softmax(teacher, -1), F.log_softmax(student, -1))


def masked_log_softmax(logits: Tensor, drop: Tensor) -> Tensor:
    """``log_softmax`` of ``(N, C)`` over the classes that are not dropped.

    Dropped entries hold a huge negative *finite* number, so that ``exp`` of them is exactly 0 and a difference of
    two of them is finite: no NaN can arise. A row with everything dropped comes out uniform, for the student as for
    the teacher: its divergence is exactly 0, and so is its gradient, because ``masked_fill`` passes none.
    """
    return F.log_softmax(logits.masked_fill(drop, torch.finfo(logits.dtype).min), dim=-1)


def margin(logits: Tensor, index: Tensor) -> Tensor:
    """Log-odds of one class against all others, ``x_y - logsumexp(x_k, k != y)``, of each row: ``(N,)``.

    Its sigmoid is the softmax probability of that class, and ``-margin`` gives the probability of the rest without the
    cancellation of ``1 - p``.

    Args:
        logits: ``(N, C)``, already divided by the temperature.
        index: ``(N,)`` the class of each row.
    """
    index = index.unsqueeze(-1)
    rest = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
    return logits.gather(-1, index).squeeze(-1) - rest


def binary_kl(teacher_margin: Tensor, student_margin: Tensor) -> Tensor:
    """``KL([p, 1 - p] || [q, 1 - q])`` with ``p, q`` the sigmoids of two log-odds, in nats, element by element."""
    p, rest = teacher_margin.sigmoid(), (-teacher_margin).sigmoid()
    return p * (F.logsigmoid(teacher_margin) - F.logsigmoid(student_margin)) + rest * (
        F.logsigmoid(-teacher_margin) - F.logsigmoid(-student_margin)
    )


# Logits in a block: its temporaries stay in the cache (CPU) or are few beside the weights (accelerators).
BLOCK_ELEMENTS = {"cpu": 2**18, "other": 2**22}


def by_row_blocks(
    row_losses: Callable[..., tuple[Tensor, ...]], student: Tensor, *others: Tensor
) -> tuple[Tensor, ...]:
    """``row_losses(student, *others)`` of large inputs a block of rows at a time, with the gradient in the same sweep.

    Losses of rows are independent, so each block's gradient can be taken at once instead of keeping its dozen
    ``(N, C)`` temporaries until the backward pass: with many classes that is faster (a block stays in the cache) and
    takes memory for one gradient a loss. Small inputs, where this would not pay, go straight through.

    Args:
        row_losses: maps ``(n, C)`` student rows and the matching rows of ``others`` to a tuple of ``(n,)`` losses.
        student: ``(N, C)``, the only argument that may need a gradient (a second derivative needs the direct way).
        others: tensors with ``N`` rows.
    """
    block = BLOCK_ELEMENTS.get(student.device.type, BLOCK_ELEMENTS["other"])
    if student.numel() <= 4 * block or torch.compiler.is_compiling():
        return row_losses(student, *others)
    return _RowBlocks.apply(row_losses, max(1, block // student.shape[1]), student, *others)


class _RowBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row_losses: Callable, size: int, student: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        need_gradient = ctx.needs_input_grad[2]
        values: list[tuple[Tensor, ...]] = []
        gradients: list[Tensor] = []
        for start in range(0, len(student), size):
            rows = slice(start, start + size)
            leaf = student[rows].detach().requires_grad_(need_gradient)
            with torch.set_grad_enabled(need_gradient):
                losses = row_losses(leaf, *(other[rows] for other in others))
            values.append(tuple(loss.detach() for loss in losses))
            if need_gradient:
                gradients = gradients or [torch.empty_like(student) for _ in losses]
                for i, (loss, gradient) in enumerate(zip(losses, gradients, strict=True), start=1):
                    (gradient[rows],) = torch.autograd.grad(
                        loss, leaf, torch.ones_like(loss), retain_graph=i < len(losses)
                    )
        ctx.save_for_backward(*gradients)
        return tuple(torch.cat(parts) for parts in zip(*values, strict=True))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        # ``once_differentiable`` would let this pass, and the second derivative would silently be without this loss.
        if torch.is_grad_enabled():
            raise RuntimeError("a batch this large has no second derivative (create_graph=True); split the batch.")
        result = None
        for weight, gradient in zip(outer, ctx.saved_tensors, strict=True):
            weight = weight.unsqueeze(-1)
            result = weight * gradient if result is None else result.addcmul_(weight, gradient)
        return None, None, result, *(None for _ in ctx.needs_input_grad[3:])
