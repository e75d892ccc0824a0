"""Label revision (LR): Lan et al., "Improve Knowledge Distillation via Label Revision and Data Selection".

arXiv 2404.03693. If the teacher is right, the student learns its logits; if it is wrong, its probabilities are mixed
with the label until the true class has the largest. The paper's data selection is not included.
"""

from dataclasses import KW_ONLY
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import standardize
from rld_lightning.losses.ranges import Share, Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import by_row_blocks, logit_rows


@checked
def revision_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    *,
    right_mse_weight: Weight = 4.0,
    wrong_mse_weight: Weight = 1.0,
    eta: Share = 0.8,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: Literal["mean"] = "mean",
) -> dict[str, Tensor]:
    """Computes the losses of the samples that the teacher classifies correctly, and of those that it does not.

    With teacher logits t and probabilities p, student logits s, label y::

        right CE = CE(s, y),  right MSE = mean_k (s_k - t_k)^2       averaged over the samples with argmax t = y
        wrong MSE = mean_k (softmax(s)_k - r_k)^2                    averaged over the others
        r = b p + (1 - b) onehot(y),  b = eta / (max_k p_k - p_y + 1)

    In the distribution r, the true class exceeds the next largest by ``1 - eta``. There is no temperature.
    Samples that the teacher misclassifies have no cross-entropy. A group without samples adds exactly 0; the published
    code returns a constant, which cannot be differentiated.

    Args:
        right_mse_weight: weight of the logits' error (lambda 1 in the paper).
        wrong_mse_weight: weight of the probabilities' error (lambda 2 in the paper).
        eta: the teacher's share in r; in (0, 1].
        logit_standardization: z-score both logits first (LSKD, arXiv 2403.01427), except for the cross-entropy.
        reduction: only the mean, because each term is a mean over a subset of the batch.
        others: see :mod:`rld_lightning.losses`.

    Returns:
        ``right_ce`` (in nats), ``right_mse`` and ``wrong_mse``, weighted scalars.
    """
    rows = logit_rows(student_logits, teacher_logits, label, ignore_index=ignore_index)

    def row_losses(student: Tensor, teacher: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_probs = F.log_softmax(student, -1)
        ce = -log_probs.gather(-1, label.unsqueeze(-1)).squeeze(-1)
        if logit_standardization:
            student, teacher = standardize(student), standardize(teacher)
            log_probs = F.log_softmax(student, -1)
        revised = revise(F.softmax(teacher, -1), label, eta)
        return ce, (student - teacher).square().mean(-1), (log_probs.exp() - revised).square().mean(-1)

    assert rows.label is not None
    assert rows.valid is not None
    ce, logit_error, probability_error = by_row_blocks(row_losses, rows.student, rows.teacher, rows.label)
    right = rows.teacher.argmax(-1) == rows.label
    return {
        "right_ce": _group_mean(ce, rows.valid & right),
        "right_mse": right_mse_weight * _group_mean(logit_error, rows.valid & right),
        "wrong_mse": wrong_mse_weight * _group_mean(probability_error, rows.valid & ~right),
    }


def revise(probs: Tensor, label: Tensor, eta: float) -> Tensor:
    """Returns the distribution r of each row of ``(N, C)`` probabilities."""
    true = label.unsqueeze(-1)
    true_probs = probs.gather(-1, true)
    share = eta / (probs.amax(-1, keepdim=True) - true_probs + 1)
    return (share * probs).scatter(-1, true, share * true_probs + 1 - share)


def _group_mean(per_row: Tensor, group: Tensor) -> Tensor:
    return torch.where(group, per_row, 0.0).sum() / group.sum().clamp(min=1)


@register_loss("revision")
class RevisionLoss(LogitLoss):
    """``right CE + right_mse_weight * right MSE + wrong_mse_weight * wrong MSE``; see :func:`revision_loss`.

    The defaults are those of RLD's public code for CIFAR-100 and ImageNet. The cross-entropy of all samples is off
    (``ce_weight=0``), because the method has its own.
    """

    method = "Label revision"
    papers = ("2404.03693",)
    of_whole_batch = True
    function = staticmethod(revision_loss)

    right_mse_weight: Weight = 4.0
    wrong_mse_weight: Weight = 1.0
    eta: Share = 0.8
    _: KW_ONLY
    logit_standardization: bool = False
    ce_weight: Weight = 0.0
