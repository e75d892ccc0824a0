"""Dual-head knowledge distillation (DHKD): Yang et al., arXiv 2411.08937.

A loss on individual logits and the cross-entropy have conflicting gradients in the linear classifier, though not in the
rest of the network. Therefore the student distils through an auxiliary head, which is dropped after training, and the
part of the gradient that opposes the cross-entropy is removed.
"""

from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rld_lightning.losses.base import DistillationLoss, StepContext
from rld_lightning.losses.features.base import BatchNorm1d, tapped_features
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
    """Computes BinaryKL-Norm: each logit's distance from the teacher's, as a divergence of Bernoulli distributions.

    With auxiliary logits a, teacher logits t and temperature T, summed over classes and averaged over the batch::

        T^2 KL( [1/2, 1/2] || [q, 1 - q] ) = T^2 log cosh( (a - t) / (2 T) ),   q = sigmoid((a - t) / T)

    The published code computes the left side and clamps q to ``[1e-8, 1 - 1e-8]``, so the gradient is 0 if a and t
    differ by more than 18 T. The right side, used here, is the same function without clamping.

    Args:
        auxiliary_logits: ``(B, C)``, any floating type; float16 and bfloat16 are computed in float32.
        teacher_logits: the same shape; never receives a gradient.
        temperature: T.
        weight: factor on the term (alpha in the paper).

    Returns:
        ``{"dhkd": weight * BinaryKL-Norm}`` in nats.

    Raises:
        ValueError: invalid shapes, class counts or hyper-parameters.
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

    See :func:`dhkd_loss`. The defaults are those of the published example on CIFAR-100. The one on ImageNet has
    ``head="linear"``, ``align_gradients=False`` and ``weight=0.1``, and disables the term after half of the epochs,
    which is not implemented here. The teacher may be any network, because only its logits are used.

    The head has PyTorch's default initialisation for every student. In the published code this holds for ResNets and
    ShuffleNets. For WRNs, VGGs and MobileNetV2, the biases of the head's linear layers start at 0; for VGGs and
    MobileNetV2, their weights also have standard deviation 0.01.

    With ``align_gradients``, the part of the distillation term's gradient d (with respect to all trained parameters)
    that opposes the cross-entropy's gradient c is removed: if ``<d, c> < 0``, d becomes ``d - <d, c> / |c|^2 c``. The
    values of the terms do not change. ``backward`` of their *sum* passes the aligned gradient to the parameters (not to
    the logits), with loss scaling, clipping, accumulation and DDP as usual. It needs two backward passes through the
    student and frees its graph: nothing else can be differentiated through the same forward pass. Each DDP process
    aligns its gradients before they are averaged, for each accumulated batch.

    Args:
        head: ``"nonlinear"`` (one hidden layer of 200 with dropout and batch norm) or ``"linear"``.
        align_gradients: whether to align the gradients; otherwise the plain sum is minimised.
        ce_weight: weight of the plain cross-entropy (gamma in the paper).
    """

    method = "Dual-head KD, gradients aligned"
    papers = ("2411.08937",)

    takes_mixtures = False  # aligns the gradients of a single loss

    weight: Weight = 1.0
    temperature: Positive = 2.0
    head: Head = "nonlinear"
    align_gradients: bool = True
    ignore_index: int = field(default=-100, init=False)
    _student: nn.Module = field(init=False)

    def connect(
        self, student: nn.Module, teacher: nn.Module | None, image_shape: Sequence[int], train_label: Tensor
    ) -> None:
        """Builds the auxiliary head on the student's pooled feature, and stores the student for the alignment."""
        pooled = stages_of(student).pooled
        classifier = pooled.removesuffix(":in")
        shapes = feature_shapes(student, image_shape, (pooled, classifier))
        width, classes = shapes[pooled][1:].numel(), shapes[classifier][1]
        self.auxiliary = nn.Linear(width, classes) if self.head == "linear" else _nonlinear_head(width, classes)
        self.student_taps = (pooled,)
        hold_outside(self, "_student", student)

    def terms(self, step: StepContext) -> dict[str, Tensor]:
        """Returns ``dhkd``."""
        if not self.student_taps:
            raise RuntimeError("DHKDLoss does not know the student yet: call its connect(...) first.")
        (pooled,), _ = tapped_features(self, step)
        logits = self.auxiliary(pooled.flatten(1).to(next(self.auxiliary.parameters()).dtype))
        return dhkd_loss(logits, step.teacher_logits, temperature=self.temperature, weight=self.weight)

    def forward(
        self, student: StepContext | Tensor, teacher: Tensor | None = None, label: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Computes :meth:`DistillationLoss.forward`, with aligned gradients of the sum."""
        terms = super().forward(student, teacher, label)
        needs_grad = torch.is_grad_enabled() and all(term.requires_grad for term in terms.values())
        if not (self.align_gradients and "ce" in terms and needs_grad):
            return terms
        parameters = [p for network in (self._student, self) for p in network.parameters() if p.requires_grad]
        ce, dhkd = _AlignedGradients.apply((terms["ce"], terms["dhkd"]), *parameters)
        return {"ce": ce, "dhkd": dhkd}


def _nonlinear_head(width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 200), nn.Dropout(0.1), BatchNorm1d(200), nn.ReLU(), nn.Linear(200, classes))


def align(gradient: Tensor, reference: Tensor) -> Tensor:
    """Removes the part of a gradient that opposes a reference: ``g - min(<g, r>, 0) / |r|^2 r``, vectors ``(N,)``."""
    overlap = (gradient @ reference).clamp(max=0)
    # The clamp avoids 0 / 0 if the reference is all zeros; the overlap is then 0 as well.
    return gradient - overlap / reference.square().sum().clamp(min=torch.finfo(reference.dtype).tiny) * reference


class _AlignedGradients(torch.autograd.Function):
    """Returns two losses unchanged; its backward pass differentiates both and aligns the second with the first.

    The gradients are computed in the backward pass, because only there the factor of loss scaling is known, without
    which float16 gradients vanish. The losses are passed as a tuple, so that autograd sees the parameters, and not the
    losses' graph, as the inputs of this node.
    """

    @staticmethod
    def forward(ctx: Any, losses: tuple[Tensor, Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.losses = losses
        ctx.parameters = parameters
        return tuple(loss.detach() for loss in losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("aligned gradients have no second derivative (create_graph=True).")
        first, second = (
            torch.autograd.grad(loss, ctx.parameters, factor, retain_graph=loss is ctx.losses[0], allow_unused=True)
            for loss, factor in zip(ctx.losses, grad_outputs, strict=True)
        )
        if all(gradient is None for gradient in first):
            raise RuntimeError("the student's parameters have no part in its logits: connect the loss to that student.")
        reference = _flat(first, ctx.parameters)
        total = reference + align(_flat(second, ctx.parameters), reference)
        return None, *(
            # Parameters that neither loss depends on have no gradient, as without alignment.
            # The gradient has the parameter's memory layout, as DDP's buckets need.
            None if a is None and b is None else torch.empty_like(parameter).copy_(part.view_as(parameter))
            for parameter, part, a, b in zip(
                ctx.parameters, total.split([p.numel() for p in ctx.parameters]), first, second, strict=True
            )
        )


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Concatenates gradients to one vector, in float32 or better; zeros for parameters without gradient."""
    pairs = zip(gradients, parameters, strict=True)
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
    return flat.to(torch.promote_types(flat.dtype, torch.float32))
