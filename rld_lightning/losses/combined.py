"""A weighted sum of losses that share one forward pass of teacher and student."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from rld_lightning.losses.base import DistillationLoss, StepContext
from rld_lightning.losses.ranges import WEIGHT


class CombinedLoss(DistillationLoss):
    """``ce_weight * CE + sum of weights[name] * (the terms of losses[name])``.

    Each loss keeps its hyper-parameters and its warm-up, except for the cross-entropy: it is added once, and the
    combination's ``ce_weight`` and ``label_smoothing`` overwrite those of the losses. (Label revision keeps its own
    cross-entropy term in addition.) Features that several losses use are collected once. Terms are named
    ``<name>/<term>``, or ``<name>`` if the term has the name of the loss::

        loss = CombinedLoss(rld=RLDLoss(), at=ATLoss(), weights={"at": 0.5})  # ce, rld/scd, rld/mcd, at

    On the command line: ``loss=[rld,at] loss.at.weight=500 loss.weights.rld=0.5``.

    Args:
        weights: factor on all terms of a loss, by the loss's name; 1 if not given, 0 disables the loss.
        ce_weight: weight of the plain cross-entropy.
        ignore_index: label of samples that the cross-entropy ignores.
        label_smoothing: label smoothing of the cross-entropy.
        **losses: at least two losses by name.

    Raises:
        ValueError: fewer than two losses, a weight of an unknown loss, or a loss that cannot be combined.
    """

    def __init__(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        ce_weight: float = 1.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        **losses: DistillationLoss,
    ) -> None:
        super().__init__(ce_weight=ce_weight, ignore_index=ignore_index, label_smoothing=label_smoothing)
        if len(losses) < 2:
            raise ValueError(f"a combination needs at least two losses, got {list(losses)}; try loss=[rld,at].")
        unknown = sorted(set(weights or {}) - set(losses))
        if unknown:
            raise ValueError(f"weights names {unknown}, which are not among the losses {list(losses)}.")
        for name, loss in losses.items():
            if type(loss).forward is not DistillationLoss.forward:
                raise ValueError(
                    f"{name} aligns its gradient with that of its own cross-entropy and cannot be combined; use it "
                    "alone, or remove it."
                )
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in losses}
        for name, weight in self.weights.items():
            WEIGHT.check(name, weight)
        # Disabled losses are removed: DDP would wait for the gradients of their learnable parts.
        losses = {name: loss for name, loss in losses.items() if self.weights[name]}
        self.losses = nn.ModuleDict(losses)
        self.needs_teacher = any(loss.needs_teacher for loss in losses.values())
        self.takes_mixtures = all(loss.takes_mixtures for loss in losses.values())
        self.needs_strong_view = any(loss.needs_strong_view for loss in losses.values())
        self.of_whole_batch = any(loss.of_whole_batch for loss in losses.values())
        self.reuses_classifier = any(loss.reuses_classifier for loss in losses.values())
        for loss in losses.values():
            loss.ce_weight, loss.label_smoothing = ce_weight, label_smoothing
        self._collect_taps_and_buffers()

    @property
    def parts(self) -> dict[str, DistillationLoss]:
        """The losses by name, without the disabled ones."""
        return {name: cast(DistillationLoss, loss) for name, loss in self.losses.items()}

    def connect(
        self, student: nn.Module, teacher: nn.Module | None, image_shape: Sequence[int], train_label: Tensor
    ) -> None:
        """Connects all losses."""
        for loss in self.parts.values():
            loss.connect(student, teacher, image_shape, train_label)
        self._collect_taps_and_buffers()

    def terms(self, step: StepContext) -> dict[str, Tensor]:
        """Returns the terms of all losses, with their weights and each loss's warm-up."""
        terms: dict[str, Tensor] = {}
        for name, loss in self.parts.items():
            factor = self.weights[name] * loss.warmup(step.epoch)
            part_terms = {_term_name(name, term): value for term, value in loss.terms(step).items()}
            terms |= {term: factor * value if factor != 1.0 else value for term, value in part_terms.items()}
        return terms

    def statistics(self, step: StepContext) -> dict[str, Tensor]:
        """Returns the statistics of all losses."""
        return {
            _term_name(name, statistic): value
            for name, loss in self.parts.items()
            for statistic, value in loss.statistics(step).items()
        }

    def refined(self, teacher: Tensor, label: Tensor) -> Tensor | None:
        """Returns the refined logits of the first loss that changes them."""
        views = (loss.refined(teacher, label) for loss in self.parts.values())
        return next((view for view in views if view is not None), None)

    def describe(self) -> str:
        """Returns the weighted sum of the losses in one line."""
        parts = [f"{self.weights[name]:g} * {loss.describe()}" for name, loss in self.parts.items()]
        return " + ".join([f"{self.ce_weight:g} * CE", *parts])

    def _collect_taps_and_buffers(self) -> None:
        self.own_buffers = tuple(
            f"losses.{name}.{buffer}" for name, loss in self.parts.items() for buffer in loss.own_buffers
        )
        self.student_taps = tuple(dict.fromkeys(path for loss in self.parts.values() for path in loss.student_taps))
        self.teacher_taps = tuple(dict.fromkeys(path for loss in self.parts.values() for path in loss.teacher_taps))


def _term_name(loss: str, term: str) -> str:
    return loss if term == loss else f"{loss}/{term}"
