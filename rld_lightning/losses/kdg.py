"""KD by approximation (KD-G), logit members: Hsu et al., "A Closer Look at Knowledge Distillation with Features,
Logits, and Gradients", arXiv 2203.10163.

To second order in ``d = s - t``, the divergence of two softmaxes is half the Fisher information of the first along d::

    KL( softmax(t) || softmax(s) ) ~ 1/2 d' F d,   F = E over y ~ softmax(t) of [ g g' ],   g = grad log softmax(t)_y

Whatever t and s are made of, logits or features under a linear classifier, this gives one family of losses, from the
full F over its diagonal to the identity in its place. This is a reconstruction: no code of the paper is public, and
its weights and temperatures are not known to us. Feature members: :mod:`rld_lightning.losses.features.kdg`.
"""

import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import LogitLoss
from rld_lightning.losses.numerics import by_row_blocks, check_positive, check_weights, logit_rows
from rld_lightning.losses.registry import register_loss

WEIGHTINGS = ("fisher", "identity")


def kdg_logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor | None = None,
    *,
    weighting: str = "fisher",
    temperature: float = 1.0,
    weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> dict[str, Tensor]:
    """Squared difference of logits as the teacher weighs it, averaged over the batch.

    With student logits s, teacher logits t, ``d = s - t`` and ``p = softmax(t / T)``::

        fisher    1/2 d' (diag(p) - p p') d = 1/2 Var_p(d)    ~ T^2 KL( softmax(t / T) || softmax(s / T) )
        identity  1/2 |d|^2

    The first tends to ``|d - mean(d)|^2 / (2 C)`` for large T.

    Args:
        student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        label: ``(B,)`` or ``(B, *)``, only to leave out the samples that hold ``ignore_index``; ``None`` keeps all.
        weighting: ``"fisher"`` (KD-logit-F) or ``"identity"`` (KD-logit-L2).
        temperature: T; the identity does not use it.
        weight: factor on the term.
        ignore_index: label of samples that count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (then the term is ``(B, *)``).

    Returns:
        ``{"kdg_logit": weight * loss}``.

    Raises:
        ValueError: shapes, class counts, labels or hyper-parameters that do not fit.
    """
    check_positive(temperature=temperature)
    check_weights(weight=weight)
    check_weighting(weighting, WEIGHTINGS)
    rows = logit_rows(student_logits, teacher_logits, label, ignore_index=ignore_index, reduction=reduction)

    def row_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
        if weighting == "identity":
            return ((student - teacher).square().sum(-1) / 2,)
        return (half_variance(student - teacher, F.softmax(teacher / temperature, -1)),)

    (loss,) = by_row_blocks(row_losses, rows.student, rows.teacher)
    return {"kdg_logit": weight * rows.reduce(loss, reduction)}


def half_variance(values: Tensor, probs: Tensor) -> Tensor:
    """``1/2 sum_k p_k (x_k - sum_j p_j x_j)^2`` of each row of ``(N, C)`` values and probabilities: ``(N,)``."""
    centred = values - (probs * values).sum(-1, keepdim=True)
    return (probs * centred.square()).sum(-1) / 2


def check_weighting(weighting: str, choices: tuple[str, ...]) -> None:
    """Raises ``ValueError`` for a word that is none of the choices."""
    if weighting not in choices:
        raise ValueError(f"weighting={weighting!r} is unknown; choose one of {', '.join(choices)}.")


@register_loss("kdg_logit")
class KDGLogitLoss(LogitLoss):
    """``ce_weight * CE + weight * loss``; see :func:`kdg_logit_loss`.

    The paper's weights are not known to us. The defaults are those of plain KD on CIFAR-100, which the Fisher form
    approximates; the identity is some ``C`` times as large and wants a weight as much smaller.
    """

    method = "KD-G: logits weighted by the teacher's gradients (reconstruction)"
    papers = ("2203.10163",)

    function = staticmethod(kdg_logit_loss)

    def __init__(
        self,
        weight: float = 0.9,
        weighting: str = "fisher",
        temperature: float = 4.0,
        *,
        ce_weight: float = 0.1,
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
        check_positive(temperature=temperature)
        check_weights(weight=weight)
        check_weighting(weighting, WEIGHTINGS)
        self.weight = weight
        self.weighting = weighting
        self.temperature = temperature
