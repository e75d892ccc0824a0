"""Distillation from swapped teacher logits: a teacher that is wrong is corrected by exchanging two of its logits.

One of the methods that RLD (arXiv 2408.07703) is compared to, there called LA, in its public code SWAP. The same
exchange is a "knowledge adjustment" in Wen et al., "Preparing Lessons: Improve Knowledge Distillation with Better
Supervision", arXiv 1911.07471.
"""

from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import by_row_blocks, check_positive, check_weights, logit_rows, softmax_kl
from rld_lightning.losses.registry import register_loss


def swap_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    *,
    temperature: float,
    weight: float = 1.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """``T^2 KL( softmax(t' / T) || softmax(s / T) )``, averaged over the batch.

    t' are the teacher's logits with the largest one and the true class's exchanged (the first of several largest), so
    the true class always leads and a teacher that is right stays as it is.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        label: ``(B,)`` or ``(B, *)`` class indices.
        temperature: softmax temperature of both.
        weight: factor on the term.
        logit_standardization: z-score both logits first (LSKD, arXiv 2403.01427); the swap does not change the scores.
        ignore_index: label of samples that count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (then the term is ``(B, *)``).

    Returns:
        ``{"swap": weight * SWAP}`` in nats.

    Raises:
        ValueError: shapes, class counts, labels or hyper-parameters that do not fit.
    """
    check_positive(temperature=temperature)
    check_weights(weight=weight)
    rows = logit_rows(
        student_logits,
        teacher_logits,
        label,
        ignore_index=ignore_index,
        reduction=reduction,
        logit_standardization=logit_standardization,
    )

    def row_losses(student: Tensor, teacher: Tensor, label: Tensor) -> tuple[Tensor]:
        teacher = swap_logits(teacher, label)
        return (softmax_kl(teacher / temperature, student / temperature),)

    (divergence,) = by_row_blocks(row_losses, rows.student, rows.teacher, rows.label)
    return {"swap": weight * temperature**2 * rows.reduce(divergence, reduction)}


def swap_logits(teacher: Tensor, label: Tensor) -> Tensor:
    """``(N, C)`` logits with each row's largest and its true class's exchanged."""
    true, top = label.unsqueeze(-1), teacher.argmax(-1, keepdim=True)
    return teacher.scatter(-1, top, teacher.gather(-1, true)).scatter(-1, true, teacher.gather(-1, top))


@register_loss("swap")
class SwapLoss(LogitLoss):
    """``ce_weight * CE + weight * SWAP``; see :func:`swap_loss`.

    Defaults are those of CIFAR-100 in the public code of RLD, which adds no cross-entropy (``ce_weight=0``). On
    ImageNet: ``temperature=1``.
    """

    method = "KD, the teacher's largest logit and the true class's exchanged (LA)"
    papers = ("1911.07471",)

    function = staticmethod(swap_loss)

    def __init__(
        self,
        temperature: float = 4.0,
        weight: float = 1.0,
        logit_standardization: bool = False,
        *,
        ce_weight: float = 0.0,
        warmup_epochs: int = 1,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(ce_weight=ce_weight, warmup_epochs=warmup_epochs, ignore_index=ignore_index)
        check_positive(temperature=temperature)
        check_weights(weight=weight)
        self.temperature = temperature
        self.weight = weight
        self.logit_standardization = logit_standardization

    def refined(self, teacher: Tensor, label: Tensor) -> Tensor:
        """With the largest logit and the true class's exchanged."""
        return swap_logits(teacher, label)
