"""Log-space divergences and what else the logit methods share.

Everything here works on rows: logits ``(N, C)``, one distribution a row, in float32 or float64.
"""

import math
from collections.abc import Iterable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_LOGIT = 1e12


def standardize(logits: Tensor) -> Tensor:
    """Z-scores ``(*, C)`` along the last dimension: ``(x - mean) / (std + 1e-7)``, std with C - 1 in the denominator.

    In float32 or better. Logit standardization (LSKD, arXiv 2403.01427, Algorithm 1). The paper divides by C, its
    published code by C - 1; the code is followed because the published numbers come from it.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    centred = logits - logits.mean(-1, keepdim=True)
    deviation = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(logits.shape[-1] - 1)
    return centred / (deviation + 1e-7)


def total(terms: Iterable[Tensor]) -> Tensor:
    """Sum of at least one tensor, in their order."""
    return reduce(torch.add, terms)


def bounded(logits: Tensor) -> Tensor:
    """Logits between -1e12 and 1e12: those that are infinite become finite, and squares of the others stay so.

    A class that the teacher rules out by -inf keeps a probability of exactly 0. NaN stays NaN.
    """
    return F.hardtanh(logits, -LARGEST_LOGIT, LARGEST_LOGIT)  # a fourth of the time of ``clamp`` with its gradient


def non_negative(values: Tensor) -> Tensor:
    """The same values, 0 where rounding has made them negative; the gradient passes unchanged."""
    return values - values.detach().clamp(max=0)


def kl_rows(teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """``KL(teacher || student)`` of each row of two ``(N, C)`` log-probability tensors, in nats: ``(N,)``, >= 0."""
    return non_negative((teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum(-1))


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
    """``KL([p, 1 - p] || [q, 1 - q]) >= 0`` with ``p, q`` the sigmoids of two log-odds, in nats, element by element."""
    p, rest = teacher_margin.sigmoid(), (-teacher_margin).sigmoid()
    first = p * (F.logsigmoid(teacher_margin) - F.logsigmoid(student_margin))
    return non_negative(first + rest * (F.logsigmoid(-teacher_margin) - F.logsigmoid(-student_margin)))
