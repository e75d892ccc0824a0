"""Log-space divergences and other functions that the logit methods share.

All functions work on rows: logits ``(N, C)``, one distribution per row, in float32 or float64.
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

    Computed in float32 or better. Logit standardization (LSKD, arXiv 2403.01427, Algorithm 1). The paper divides by C,
    its published code by C - 1; this follows the code, because the published numbers come from it.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    centred = logits - logits.mean(-1, keepdim=True)
    deviation = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(logits.shape[-1] - 1)
    return centred / (deviation + 1e-7)


def total(terms: Iterable[Tensor]) -> Tensor:
    """Returns the sum of one or more tensors, added in their order."""
    return reduce(torch.add, terms)


def bounded(logits: Tensor) -> Tensor:
    """Clamps logits to [-1e12, 1e12], so that they and their squares are finite.

    A class that the teacher excludes by -inf still has probability exactly 0. NaN stays NaN.
    """
    return F.hardtanh(logits, -LARGEST_LOGIT, LARGEST_LOGIT)  # with its gradient, four times as fast as ``clamp``


def non_negative(values: Tensor) -> Tensor:
    """Sets values that rounding made negative to 0; the gradient passes unchanged."""
    return values - values.detach().clamp(max=0)


def kl_rows(teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """Computes ``KL(teacher || student)`` of each row of two ``(N, C)`` log-probabilities, in nats: ``(N,)``, >= 0."""
    return non_negative((teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum(-1))


def softmax_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Computes ``KL( softmax(teacher) || softmax(student) )`` of each row of ``(N, C)`` logits, in nats: ``(N,)``.

    The logits are already divided by their temperatures.
    """
    return kl_rows(F.log_softmax(teacher, -1), F.log_softmax(student, -1))


def masked_log_softmax(logits: Tensor, drop: Tensor) -> Tensor:
    """Computes ``log_softmax`` of ``(N, C)`` over the classes that are not dropped.

    Dropped entries are a huge negative *finite* number: its ``exp`` is exactly 0 and the difference of two of them is
    finite, so no NaN can arise. A row with all classes dropped is uniform for student and teacher: its divergence is
    exactly 0, and so is its gradient, because ``masked_fill`` passes none.
    """
    return F.log_softmax(logits.masked_fill(drop, torch.finfo(logits.dtype).min), dim=-1)


def margin(logits: Tensor, index: Tensor) -> Tensor:
    """Computes the log-odds of one class against all others, ``x_y - logsumexp(x_k, k != y)``, of each row: ``(N,)``.

    Its sigmoid is the softmax probability of that class; the sigmoid of ``-margin`` is the probability of the rest,
    without the cancellation of ``1 - p``.

    Args:
        logits: ``(N, C)``, already divided by the temperature.
        index: ``(N,)``, the class of each row.
    """
    selected = class_mask(logits, index)
    return torch.where(selected, logits, 0.0).sum(-1) - logits.masked_fill(selected, -torch.inf).logsumexp(-1)


def class_mask(logits: Tensor, index: Tensor) -> Tensor:
    """Returns ``(N, C)`` bool: True at the class ``(N,)`` of each row.

    For ``torch.compile``: it fuses a mask with its use, but not ``gather`` and ``scatter``, whose gradients are each a
    tensor of all logits.
    """
    return torch.arange(logits.shape[-1], device=logits.device) == index.unsqueeze(-1)


def binary_kl(teacher_margin: Tensor, student_margin: Tensor) -> Tensor:
    """Computes ``KL([p, 1 - p] || [q, 1 - q])``, p and q the sigmoids of two log-odds, in nats, elementwise; >= 0."""
    p, rest = teacher_margin.sigmoid(), (-teacher_margin).sigmoid()
    first = p * (F.logsigmoid(teacher_margin) - F.logsigmoid(student_margin))
    return non_negative(first + rest * (F.logsigmoid(-teacher_margin) - F.logsigmoid(-student_margin)))
