"""Dual-head knowledge distillation (DHKD): Yang et al., arXiv 2411.08937.

A loss on single logits and the cross-entropy pull the linear classifier in different directions, though they agree on
the rest of the network. So the student distils through a head of its own, which is dropped after training, and what
opposes the cross-entropy is taken out of the gradient.
"""

from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rld_lightning.losses.base import DistillationLoss, StepContext
from rld_lightning.losses.features.base import BatchNorm1d, tapped
from rld_lightning.losses.ranges import Positive, Weight, checked
from rld_lightning.losses.registry import register_loss
from rld_lightning.losses.rows import by_row_blocks, logit_rows
from rld_lightning.models.hold_outside import hold_outside
from rld_lightning.models.stages import stages_of
from rld_lightning.models.taps import feature_shapes

Head = Literal["nonlinear", "linear"]


@checked
def dhkd_loss(
    auxiliary_logits: Tensor, teacher_logits: Tensor, *, temperature: Positive = 2.0, weight: Weight = 1.0
) -> dict[str, Tensor]:
    """BinaryKL-Norm: how far each logit is from the teacher's, as a divergence of two coins.

    With auxiliary logits a, teacher logits t and temperature T, summed over classes and averaged over the batch::

        T^2 KL( [1/2, 1/2] || [q, 1 - q] ) = T^2 log cosh( (a - t) / (2 T) ),   q = sigmoid((a - t) / T)

    The published code takes the left side and clamps q to ``[1e-8, 1 - 1e-8]``, which ends the gradient where a and t
    are more than 18 T apart; the right side is the same function without that end.

    Args:
        auxiliary_logits: ``(B, C)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        temperature: T.
        weight: factor on the term (alpha in the paper).

    Returns:
        ``{"dhkd": weight * BinaryKL-Norm}`` in nats.

    Raises:
        ValueError: shapes, class counts or hyper-parameters that do not fit.
    """
    rows = logit_rows(auxiliary_logits, teacher_logits)

    def row_losses(auxiliary: Tensor, teacher: Tensor) -> tuple[Tensor]:
        size = (auxiliary - teacher).abs() / (2 * temperature)
        # log cosh x = x + log((1 + exp(-2x)) / 2), in a form that is exact at 0 and does not overflow.
        return ((size + torch.log1p(torch.expm1(-2 * size) / 2)).sum(-1),)

    (divergence,) = by_row_blocks(row_losses, rows.student, rows.teacher)
    return {"dhkd": weight * temperature**2 * rows.reduce(divergence, "mean")}


@register_loss("dhkd")
class DHKDLoss(DistillationLoss):
    """``ce_weight * CE + weight * BinaryKL-Norm`` of an auxiliary head on the student's pooled feature.

    See :func:`dhkd_loss`. Defaults are the published example on CIFAR-100; that on ImageNet is ``head="linear"``,
    ``align_gradients=False``, ``weight=0.1``, and switches the term off after half of the epochs, which is not done
    here. The teacher may be any network, for only its logits are looked at.

    The head starts from PyTorch's defaults for every student. In the published code that is so for ResNets and
    ShuffleNets; the linear layers of the head start without biases beside a WRN's classifier, and beside that of a VGG
    or MobileNetV2 from weights of standard deviation 0.01, too.

    With ``align_gradients``, the gradient d of the distillation term with respect to all trained parameters gives up
    what opposes that of the cross-entropy, c: where ``<d, c> < 0`` it becomes ``d - <d, c> / |c|^2 c``. The terms have
    their plain values, and ``backward`` of their *sum* delivers the aligned gradient to the parameters (not to the
    logits), with loss scaling, clipping, accumulation and DDP as usual. It takes two passes through the student and
    frees its graph: nothing else can be differentiated through the same forward pass. Each process of DDP, and each
    accumulated batch, aligns its own gradients before they are averaged.

    Args:
        head: ``"nonlinear"`` (one hidden layer of 200 with dropout and batch norm) or ``"linear"``.
        align_gradients: whether to align; otherwise the sum is minimised as it is.
        ce_weight: weight of the plain cross-entropy (gamma in the paper).
    """

    method = "Dual-head KD, gradients aligned"
    papers = ("2411.08937",)

    takes_mixtures = False  # it aligns the gradients of one loss

    weight: Weight = 1.0
    temperature: Positive = 2.0
    head: Head = "nonlinear"
    align_gradients: bool = True
    ignore_index: int = field(default=-100, init=False)
    _student: nn.Module = field(init=False)

    def connect(
        self, student: nn.Module, teacher: nn.Module | None, image_shape: Sequence[int], train_label: Tensor
    ) -> None:
        """Builds the auxiliary head beside the student's classifier, and remembers whose gradients to align."""
        pooled = stages_of(student).pooled
        classifier = pooled.removesuffix(":in")
        shapes = feature_shapes(student, image_shape, (pooled, classifier))
        width, classes = shapes[pooled][1:].numel(), shapes[classifier][1]
        self.auxiliary = nn.Linear(width, classes) if self.head == "linear" else _nonlinear_head(width, classes)
        self.student_taps = (pooled,)
        hold_outside(self, "_student", student)

    def terms(self, step: StepContext) -> dict[str, Tensor]:
        """``dhkd``."""
        if not self.student_taps:
            raise RuntimeError("DHKDLoss does not know the student yet: call its connect(...) first.")
        (pooled,), _ = tapped(self, step)
        logits = self.auxiliary(pooled.flatten(1).to(next(self.auxiliary.parameters()).dtype))
        return dhkd_loss(logits, step.teacher_logits, temperature=self.temperature, weight=self.weight)

    def forward(
        self, student: StepContext | Tensor, teacher: Tensor | None = None, label: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As :meth:`DistillationLoss.forward`; the gradients of the sum are aligned."""
        terms = super().forward(student, teacher, label)
        learns = torch.is_grad_enabled() and all(term.requires_grad for term in terms.values())
        if not (self.align_gradients and "ce" in terms and learns):
            return terms
        parameters = [p for network in (self._student, self) for p in network.parameters() if p.requires_grad]
        ce, dhkd = _AlignedGradients.apply((terms["ce"], terms["dhkd"]), *parameters)
        return {"ce": ce, "dhkd": dhkd}


def _nonlinear_head(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 200), nn.Dropout(0.1), BatchNorm1d(200), nn.ReLU(), nn.Linear(200, classes))


def align(gradient: Tensor, reference: Tensor) -> Tensor:
    """Takes out of a gradient what opposes another: ``g - min(<g, r>, 0) / |r|^2 r`` of two vectors ``(N,)``."""
    overlap = (gradient @ reference).clamp(max=0)
    # Where the overlap is not 0, neither is the length; the floor is for a reference of zeros.
    return gradient - overlap / reference.square().sum().clamp(min=torch.finfo(reference.dtype).tiny) * reference


class _AlignedGradients(torch.autograd.Function):
    """Passes two losses through; backwards, differentiates them and aligns the second's gradient with the first's.

    The work is done in the backward pass, not before, for only there is the factor known that keeps float16 gradients
    from vanishing (loss scaling). The losses come in a tuple so that autograd takes the parameters, not the graph
    behind the losses, for what this node depends on.
    """

    @staticmethod
    def forward(ctx: Any, losses: tuple[Tensor, Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.losses = losses
        ctx.parameters = parameters
        return tuple(loss.detach() for loss in losses)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("aligned gradients have no second derivative (create_graph=True).")
        first, second = (
            torch.autograd.grad(loss, ctx.parameters, factor, retain_graph=loss is ctx.losses[0], allow_unused=True)
            for loss, factor in zip(ctx.losses, outer, strict=True)
        )
        if all(gradient is None for gradient in first):
            raise RuntimeError("the student's parameters have no part in its logits: connect the loss to that student.")
        reference = _flat(first, ctx.parameters)
        total = reference + align(_flat(second, ctx.parameters), reference)
        return None, *(
            # A parameter without any part keeps having no gradient, as without alignment.
            # In the parameter's own memory layout, which DDP's buckets have.
            None if a is None and b is None else torch.empty_like(parameter).copy_(part.view_as(parameter))
            for parameter, part, a, b in zip(
                ctx.parameters, total.split([p.numel() for p in ctx.parameters]), first, second, strict=True
            )
        )


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """All gradients as one vector, zeros where there is none, in float32 or better."""
    pairs = zip(gradients, parameters, strict=True)
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
    return flat.to(torch.promote_types(flat.dtype, torch.float32))
