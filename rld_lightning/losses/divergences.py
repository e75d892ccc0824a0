"""Divergences of rows with hand-written gradients: few passes over the logits, most of them in place.

They compute the formulas of :mod:`~rld_lightning.losses.numerics`, which remain the reference and are used for second
derivatives, ``torch.compile`` and the transforms of ``torch.func``. The versions here are optimised for rows that fit
into the cache, where a pass is cheap:

- masks are numbers, because selecting with a bool tensor takes ten times as long as adding;
- exponentials are powers of two, because MKL's ``exp`` takes fifty times as long when it underflows.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses import numerics

LOG2_E = 1 / math.log(2)


def softmax_kl(teacher: Tensor, student: Tensor, drop: Tensor | None = None) -> Tensor:
    """Computes ``KL( softmax(teacher) || softmax(student) )`` of each row of ``(N, C)`` logits in nats: ``(N,)``, >= 0.

    Args:
        teacher: logits, already divided by their temperature.
        student: logits, already divided by their temperature.
        drop: ``(N, C)``, of the logits' type: 1 for classes removed from both, 0 for the others. If fewer than two
            classes of a row are left, its divergence and the gradient are exactly 0.
    """
    if teacher.requires_grad or not _use_own_gradient():
        return _softmax_kl_formula(student, teacher, drop)
    divergence: Tensor = _SoftmaxKL.apply(student, teacher, drop)
    return divergence


def margin_kl(teacher: Tensor, student: Tensor, label: Tensor) -> Tensor:
    """Computes ``KL( [p, 1 - p] || [q, 1 - q] )`` of each row in nats: ``(N,)``, >= 0.

    Args:
        teacher: the log-odds of p, ``(N,)``.
        student: logits ``(N, C)``, already divided by their temperature; q is the softmax probability of the label.
        label: ``(N,)``.
    """
    if teacher.requires_grad or not _use_own_gradient():
        return _margin_kl_formula(student, teacher, label)
    divergence: Tensor = _MarginKL.apply(student, teacher, label)
    return divergence


def margin(logits: Tensor, index: Tensor) -> Tensor:
    """Computes :func:`numerics.margin <rld_lightning.losses.numerics.margin>` for logits without gradient: ``(N,)``."""
    if not _use_own_gradient():
        return numerics.margin(logits, index)
    index = index.unsqueeze(-1)
    _, total, largest_other = _exponentials(logits.scatter(-1, index, -_mask_offset(logits)))
    return (logits.gather(-1, index) - largest_other - total.log()).squeeze(-1)


def largest_margin(logits: Tensor) -> Tensor:
    """Computes ``margin(logits, logits.argmax(-1))`` for logits without gradient, without the slow ``argmax``."""
    largest = logits.amax(-1, keepdim=True)
    is_largest = float_mask(torch.eq, logits, largest)
    log_ties = (is_largest.sum(-1, keepdim=True) - 1).log()  # other classes with the largest logit
    _, total, largest_other = _exponentials(torch.add(logits, is_largest, alpha=-_mask_offset(logits)))
    return (largest - torch.logaddexp(largest_other + total.log(), largest + log_ties)).squeeze(-1)


def float_mask(comparison: Callable[..., Tensor], logits: Tensor, other: Tensor) -> Tensor:
    """Returns ``comparison(logits, other)``, e.g. with ``torch.ge``, as 0 and 1 of the logits' type."""
    if not _use_own_gradient():
        return comparison(logits, other).to(logits.dtype)
    return comparison(logits, other, out=torch.empty_like(logits))


def float_class_mask(logits: Tensor, index: Tensor) -> Tensor:
    """Returns :func:`numerics.class_mask <rld_lightning.losses.numerics.class_mask>` as 0 and 1 of the logits' type."""
    if not _use_own_gradient():
        return numerics.class_mask(logits, index).to(logits.dtype)
    return torch.zeros_like(logits).scatter_(-1, index.unsqueeze(-1), 1.0)


class _SoftmaxKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, drop: Tensor | None) -> Tensor:
        teacher_scores, teacher_total, p = _scores(teacher, drop)
        student_scores, student_total, q = _scores(student, drop)
        p.div_(teacher_total)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(student, teacher, drop, q.div_(student_total).sub_(p))
        log_ratio = teacher_scores.sub_(student_scores).add_((student_total / teacher_total).log_())
        return log_ratio.mul_(p).sum(-1).clamp_(min=0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, drop, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiate(_softmax_kl_formula(student, teacher, drop), student, grad_output), None, None
        return gradient * grad_output.unsqueeze(-1), None, None


class _MarginKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        index = label.unsqueeze(-1)
        others, total, largest_other = _exponentials(student.scatter(-1, index, -_mask_offset(student)))
        log_odds = torch.stack([teacher, (student.gather(-1, index) - largest_other).sub_(total.log()).squeeze(-1)])
        log_p, log_q = F.logsigmoid(torch.stack([log_odds, -log_odds], 1))  # (2, N): of the label and of the rest
        p, q = log_p.exp(), log_q[0].exp()
        if ctx.needs_input_grad[0]:
            excess = (q - p[0]).unsqueeze(-1)
            ctx.save_for_backward(student, teacher, label, others.mul_(-excess / total).scatter_(-1, index, excess))
        return p.mul_(log_p - log_q).sum(0).clamp_(min=0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, label, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiate(_margin_kl_formula(student, teacher, label), student, grad_output), None, None
        return gradient * grad_output.unsqueeze(-1), None, None


def _use_own_gradient() -> bool:
    """Whether neither ``torch.compile`` nor a transform of ``torch.func``, which need the formula, is active."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def _softmax_kl_formula(student: Tensor, teacher: Tensor, drop: Tensor | None) -> Tensor:
    if drop is None:
        return numerics.softmax_kl(teacher, student)
    return numerics.kl_rows(*(numerics.masked_log_softmax(logits, drop.bool()) for logits in (teacher, student)))


def _margin_kl_formula(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    return numerics.binary_kl(teacher, numerics.margin(student, label))


def _differentiate(value: Tensor, student: Tensor, grad_output: Tensor) -> Tensor:
    return torch.autograd.grad(value, student, grad_output, create_graph=True)[0]


def _scores(logits: Tensor, drop: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits minus their maximum, the sum of their exponentials ``(N, 1)``, and these (0 if dropped)."""
    kept = logits if drop is None else torch.add(logits, drop, alpha=-_mask_offset(logits))
    scores = kept - kept.amax(-1, keepdim=True)
    exponentials = (scores * LOG2_E).exp2_()
    return scores, exponentials.sum(-1, keepdim=True), exponentials


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``exp(logits - maximum)``, computed in place, its sum and the maximum ``(N, 1)``."""
    largest = logits.amax(-1, keepdim=True)
    exponentials = logits.sub_(largest).mul_(LOG2_E).exp2_()
    return exponentials, exponentials.sum(-1, keepdim=True), largest


def _mask_offset(logits: Tensor) -> float:
    """The number subtracted from the logits of dropped classes: so large that the logit itself is rounded away."""
    return torch.finfo(logits.dtype).max / 4
