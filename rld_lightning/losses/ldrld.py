"""Local dense relational logit distillation (LDRLD): Xu et al., ICCV 2025, arXiv 2507.15911.

The classes that the student ranks first are compared two by two, so that no third class blurs how two of them relate.
"""

import torch
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import (
    binary_kl,
    by_row_blocks,
    check_positive,
    check_weights,
    kl_rows,
    logit_rows,
    masked_log_softmax,
    softmax_kl,
)
from rld_lightning.losses.registry import register_loss


def ldrld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    alpha: float,
    beta: float,
    k: int,
    temperature: float,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """Every pair of the student's k leading classes, all k of them together, and the other classes among themselves.

    With teacher logits t, student logits s, temperature T and classes c_1, ..., c_k in the order of falling s, averaged
    over the batch::

        KL(A)     = KL( softmax over A of t / T || softmax over A of s / T )         for a set of classes A
        local     = T^2 [ sum over i < j of w_ij KL({c_i, c_j}) + KL({c_1, ..., c_k}) ] / (k (k - 1) / 2 + 1)
        remaining = T^2 KL( all classes but c_1, ..., c_k )
        w_ij      = 2 exp(-0.05 (i + j)) / (1.5 + |i - j|)

    This follows the published code, which takes the classes from the student and does not treat the true class in any
    way. The code lowers the classes outside a set by 1000 where this leaves them out, and for ``k=2`` gives the whole
    set the weight of the pair; otherwise values agree.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        label: ``(B,)`` or ``(B, *)``, only to leave out the samples that hold ``ignore_index``; ``None`` keeps all.
        alpha: weight of the local term.
        beta: weight of the remaining term.
        k: number of leading classes, at least 2; where there are fewer classes, all of them lead and none remains.
        temperature: softmax temperature of both terms.
        ignore_index: label of samples that count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (then each term is ``(B, *)``).

    Returns:
        ``{"local": alpha * local, "remaining": beta * remaining}`` in nats.

    Raises:
        ValueError: shapes, class counts, labels or hyper-parameters that do not fit.
    """
    check_weights(alpha=alpha, beta=beta)
    _check_k(k)
    check_positive(temperature=temperature)
    rows = logit_rows(student_logits, teacher_logits, label, ignore_index=ignore_index, reduction=reduction)
    k = min(k, rows.student.shape[1])

    def row_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = student / temperature, teacher / temperature
        leading, classes = student.topk(k, -1)
        teacher_leading = teacher.gather(-1, classes)
        # All differences (n, k, k) by broadcasting: picking the pairs by index would add up the gradient in any order.
        pairs = binary_kl(*(x.unsqueeze(-1) - x.unsqueeze(-2) for x in (teacher_leading, leading)))
        local = (pair_weights(leading) * pairs).sum((-1, -2)) + softmax_kl(teacher_leading, leading)
        lead = torch.zeros_like(teacher, dtype=torch.bool).scatter_(-1, classes, True)
        remaining = kl_rows(masked_log_softmax(teacher, lead), masked_log_softmax(student, lead))
        return local / (k * (k - 1) / 2 + 1), remaining

    local, remaining = by_row_blocks(row_losses, rows.student, rows.teacher)
    return {
        "local": alpha * temperature**2 * rows.reduce(local, reduction),
        "remaining": beta * temperature**2 * rows.reduce(remaining, reduction),
    }


def pair_weights(leading: Tensor) -> Tensor:
    """``(k, k)`` weights of the pairs of ``(n, k)`` classes in falling order, each pair once: above the diagonal."""
    rank = torch.arange(1, leading.shape[-1] + 1, dtype=leading.dtype, device=leading.device)
    other = rank.unsqueeze(-1)
    return (2 * torch.exp(-0.05 * (rank + other)) / (1.5 + (rank - other).abs())).triu(1)


def _check_k(k: int) -> None:
    if not k >= 2:
        raise ValueError(f"k={k!r} is not allowed; it must be >= 2, because pairs of classes are compared.")


@register_loss("ldrld")
class LDRLDLoss(LogitLoss):
    """``ce_weight * CE + alpha * local + beta * remaining``; see :func:`ldrld_loss`.

    Defaults are those of the published code and of its one example (ResNet-32x4 to ResNet-8x4 on CIFAR-100), which
    also warms the learning rate up over 20 epochs. The code multiplies everything by ``ce_weight`` once more; at 1
    there is no difference.
    """

    method = "Local dense relational logit distillation"
    papers = ("2507.15911",)

    function = staticmethod(ldrld_loss)

    def __init__(
        self,
        alpha: float = 10.5,
        beta: float = 7.0,
        k: int = 7,
        temperature: float = 4.0,
        *,
        ce_weight: float = 1.0,
        warmup_epochs: int = 1,
        ignore_index: int = -100,
        logit_standardization: bool = False,
    ) -> None:
        super().__init__(
            ce_weight=ce_weight,
            warmup_epochs=warmup_epochs,
            ignore_index=ignore_index,
            logit_standardization=logit_standardization,
        )
        check_weights(alpha=alpha, beta=beta)
        _check_k(k)
        check_positive(temperature=temperature)
        self.alpha = alpha
        self.beta = beta
        self.k = k
        self.temperature = temperature
