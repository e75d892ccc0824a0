"""Divergences of rows whose gradient is worked out by hand: few passes over the logits, most of them in place.

They are the formulas of :mod:`~rld_lightning.losses.numerics`, which stay the reference: second derivatives,
``torch.compile`` and the transforms of ``torch.func`` take them. What is done in place of them here is written for rows
that fit into the cache, where a pass costs little:

- masks are numbers, because a choice by a bool tensor takes ten times as long as a sum;
- exponentials are powers of two, because where ``exp`` underflows, MKL takes fifty times as long.
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
    """``KL( softmax(teacher) || softmax(student) )`` of each row of two ``(N, C)`` logits, in nats: ``(N,)``, >= 0.

    Args:
        teacher: logits, already divided by their temperature.
        student: likewise.
        drop: ``(N, C)``, the logits' type, 1 for classes that both are without and 0 for the others. A row without
            any class, or with a single one, has exactly 0, and so is its gradient.
    """
    if teacher.requires_grad or not _by_hand():
        return _formula(student, teacher, drop)
    divergence: Tensor = _SoftmaxKL.apply(student, teacher, drop)
    return divergence


def margin_kl(teacher: Tensor, student: Tensor, label: Tensor) -> Tensor:
    """``KL( [p, 1 - p] || [q, 1 - q] )`` of each row in nats: ``(N,)``, >= 0.

    Args:
        teacher: the log-odds of p, ``(N,)``.
        student: logits ``(N, C)``, already divided by their temperature; q is the softmax probability of the label.
        label: ``(N,)``.
    """
    if teacher.requires_grad or not _by_hand():
        return _margin_formula(student, teacher, label)
    divergence: Tensor = _MarginKL.apply(student, teacher, label)
    return divergence


def margin(logits: Tensor, index: Tensor) -> Tensor:
    """:func:`numerics.margin <rld_lightning.losses.numerics.margin>` of logits without gradient: ``(N,)``."""
    index = index.unsqueeze(-1)
    _, total, log_scale = _exponentials(logits.scatter(-1, index, -_huge(logits)))
    return (logits.gather(-1, index) - log_scale - total.log()).squeeze(-1)


def largest_margin(logits: Tensor) -> Tensor:
    """``margin(logits, logits.argmax(-1))`` of logits without gradient, without the slow search for an index."""
    largest = logits.amax(-1, keepdim=True)
    lead = marks(torch.eq, logits, largest)
    log_others = (lead.sum(-1, keepdim=True) - 1).log()  # of those that share the lead
    _, total, log_scale = _exponentials(torch.add(logits, lead, alpha=-_huge(logits)))
    return (largest - torch.logaddexp(log_scale + total.log(), largest + log_others)).squeeze(-1)


def marks(comparison: Callable[..., Tensor], logits: Tensor, other: Tensor) -> Tensor:
    """``comparison(logits, other)``, as ``torch.ge`` and its like give it, in 0 and 1 of the logits' type."""
    if not _by_hand():
        return comparison(logits, other).to(logits.dtype)
    return comparison(logits, other, out=torch.empty_like(logits))


class _SoftmaxKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, drop: Tensor | None) -> Tensor:
        of_teacher, teacher_total, probs = _scores(teacher, drop)
        of_student, student_total, student_probs = _scores(student, drop)
        log_ratio = of_teacher.sub_(of_student).add_((student_total / teacher_total).log_())
        divergence = log_ratio.mul_(probs).sum(-1, keepdim=True).div_(teacher_total)
        if ctx.needs_input_grad[0]:
            student_probs.mul_(1 / student_total).sub_(probs.mul_(1 / teacher_total))
            ctx.save_for_backward(student, teacher, drop, student_probs)
        return divergence.clamp_(min=0).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, drop, difference = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _derived(_formula(student, teacher, drop), student, outer), None, None
        return difference * outer.unsqueeze(-1), None, None


class _MarginKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        true = label.unsqueeze(-1)
        probs, total, log_scale = _exponentials(student.scatter(-1, true, -_huge(student)))
        log_odds = torch.stack([teacher, (student.gather(-1, true) - log_scale).sub_(total.log()).squeeze(-1)])
        log_yes, log_no = F.logsigmoid(log_odds), F.logsigmoid(-log_odds)
        (yes, student_yes), no = log_yes.exp(), log_no[0].exp()
        if ctx.needs_input_grad[0]:
            slope = (student_yes - yes).unsqueeze(-1)
            ctx.save_for_backward(student, teacher, label, probs.mul_(-slope / total).scatter_(-1, true, slope))
        return (yes * (log_yes[0] - log_yes[1])).add_(no * (log_no[0] - log_no[1])).clamp_(min=0)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, label, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _derived(_margin_formula(student, teacher, label), student, outer), None, None
        return slope * outer.unsqueeze(-1), None, None


def _by_hand() -> bool:
    """Not where somebody wants to see the formula: a compiler, or a transform of ``torch.func``."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def _formula(student: Tensor, teacher: Tensor, drop: Tensor | None) -> Tensor:
    if drop is None:
        return numerics.softmax_kl(teacher, student)
    return numerics.kl_rows(*(numerics.masked_log_softmax(logits, drop.bool()) for logits in (teacher, student)))


def _margin_formula(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    return numerics.binary_kl(teacher, numerics.margin(student, label))


def _derived(value: Tensor, by: Tensor, outer: Tensor) -> Tensor:
    return torch.autograd.grad(value, by, outer, create_graph=True)[0]


def _scores(logits: Tensor, drop: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits below their maximum, the sum of their exponentials ``(N, 1)``, and those: exactly 0 where dropped."""
    kept = logits if drop is None else torch.add(logits, drop, alpha=-_huge(logits))
    scores = kept - kept.amax(-1, keepdim=True)
    exponentials = (scores * LOG2_E).exp2_()
    return scores, exponentials.sum(-1, keepdim=True), exponentials


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place of the logits their exponentials, after the maximum is taken off; their sum, the maximum ``(N, 1)``."""
    largest = logits.amax(-1, keepdim=True)
    exponentials = logits.sub_(largest).mul_(LOG2_E).exp2_()
    return exponentials, exponentials.sum(-1, keepdim=True), largest


def _huge(logits: Tensor) -> float:
    """What lowers a class below every other; so large that nothing is left of its own logit."""
    return torch.finfo(logits.dtype).max / 4
