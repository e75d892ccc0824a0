"""Knowledge distillation (KD): Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531."""

from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import by_row_blocks, check_positive, check_weights, logit_rows, softmax_kl
from rld_lightning.losses.registry import register_loss


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    temperature: float,
    weight: float = 1.0,
    logit_standardization: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """``T^2 KL( softmax(t / T) || softmax(s / T) )`` of teacher logits t and student logits s, averaged over the batch.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        label: ``(B,)`` or ``(B, *)``, only to leave out the samples that hold ``ignore_index``; ``None`` keeps all.
        temperature: softmax temperature of both.
        weight: factor on the term.
        logit_standardization: z-score both logits first (LSKD, arXiv 2403.01427).
        ignore_index: label of samples that count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (then the term is ``(B, *)``).

    Returns:
        ``{"kd": weight * KD}`` in nats.

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

    def row_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
        return (softmax_kl(teacher / temperature, student / temperature),)

    (divergence,) = by_row_blocks(row_losses, rows.student, rows.teacher)
    return {"kd": weight * temperature**2 * rows.reduce(divergence, reduction)}


@register_loss("kd")
class KDLoss(LogitLoss):
    """``ce_weight * CE + weight * KD``; see :func:`kd_loss`.

    Defaults are those of CIFAR-100 in the benchmark's code. On ImageNet: ``temperature=1, weight=0.5`` and
    ``ce_weight=1`` (ResNet-34 to ResNet-18) or ``0.5`` (ResNet-50 to MobileNetV1).
    """

    method = "Knowledge distillation"
    papers = ("1503.02531",)

    function = staticmethod(kd_loss)

    def __init__(
        self,
        temperature: float = 4.0,
        weight: float = 0.9,
        logit_standardization: bool = False,
        *,
        ce_weight: float = 0.1,
        warmup_epochs: int = 1,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(ce_weight=ce_weight, warmup_epochs=warmup_epochs, ignore_index=ignore_index)
        check_positive(temperature=temperature)
        check_weights(weight=weight)
        self.temperature = temperature
        self.weight = weight
        self.logit_standardization = logit_standardization
