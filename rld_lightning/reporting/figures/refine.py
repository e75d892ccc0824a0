"""RLD for one sample in its parts: the teacher's outputs, the refined knowledge, and the student's outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.losses.base import cross_entropy
from rld_lightning.losses.kd import kd_loss
from rld_lightning.losses.numerics import margin, masked_log_softmax, standardize
from rld_lightning.losses.rld import RLDLoss, masked_classes, rld_loss
from rld_lightning.reporting.labels import short_value
from rld_lightning.runs.finished import Run
from rld_lightning.runs.naming import class_name
from rld_lightning.runs.rebuild import build_loss


@dataclass(frozen=True)
class Refinement:
    """The quantities of RLD for one sample."""

    label: int  # the true class
    favourite: int  # the class of the teacher's largest logit
    rank: int  # rank of the true class among the teacher's logits, from 1
    teacher_logits: Tensor  # `(C,)`
    student_logits: Tensor  # `(C,)`
    teacher_probs: Tensor  # `(C,)` softmax at RLD's temperature, which plain distillation compares
    student_probs: Tensor  # the same for the student
    masked: Tensor  # `(C,)` bool, the classes masked by MCD
    teacher_confidence: float  # the teacher's probability of its favourite, in SCD
    student_confidence: float  # the student's probability of the true class; SCD pulls it to `teacher_confidence`
    teacher_correlation: Tensor  # `(C,)` MCD's distribution over the unmasked classes; 0 for the others
    student_correlation: Tensor  # the same for the student
    # `ce`, the weighted `scd` and `mcd`, and `kd` with weight 1 for comparison, of this sample; in nats, with the
    # factor T^2 of the losses
    terms: dict[str, float]

    @property
    def teacher_is_right(self) -> bool:
        """Whether the teacher's favourite is the true class."""
        return self.favourite == self.label


def refine(student_logits: Tensor, teacher_logits: Tensor, label: int, loss: RLDLoss) -> Refinement:
    """Computes RLD's parts for one sample.

    Args:
        student_logits: ``(C,)``.
        teacher_logits: ``(C,)``.
        label: the true class.
        loss: for alpha, beta, temperatures and mask; its warm-up is ignored.

    Raises:
        ValueError: the logits do not match each other or the label.
    """
    student, teacher, true = student_logits[None], teacher_logits[None], torch.tensor([label])
    temperature, standardized = loss.temperature, loss.logit_standardization
    confidence_temperature = loss.confidence_temperature or temperature
    terms = rld_loss(
        student, teacher, true, alpha=loss.alpha, beta=loss.beta, temperature=temperature, mask=loss.mask,
        confidence_temperature=confidence_temperature, logit_standardization=standardized,
    )  # fmt: skip
    terms |= kd_loss(student, teacher, temperature=temperature, logit_standardization=standardized)
    terms["ce"] = cross_entropy(student, true)
    if standardized:
        student, teacher = standardize(student), standardize(teacher)
    masked = masked_classes(teacher, true, loss.mask)
    favourite = teacher.argmax(-1)
    confidence = [
        margin(logits / confidence_temperature, index).sigmoid().item()
        for logits, index in ((teacher, favourite), (student, true))
    ]
    correlation = [
        masked_log_softmax(logits / temperature, masked).exp().masked_fill(masked, 0.0)[0]
        for logits in (teacher, student)
    ]
    return Refinement(
        label=label,
        favourite=int(favourite),
        rank=1 + int((teacher > teacher[0, label]).sum()),
        teacher_logits=teacher_logits,
        student_logits=student_logits,
        teacher_probs=F.softmax(teacher / temperature, -1)[0],
        student_probs=F.softmax(student / temperature, -1)[0],
        masked=masked[0],
        teacher_confidence=confidence[0],
        student_confidence=confidence[1],
        teacher_correlation=correlation[0],
        student_correlation=correlation[1],
        terms={name: float(term) for name, term in terms.items()},
    )


def rld_of(run: Run) -> RLDLoss | None:
    """The RLD loss of a run, alone or as a part of its loss; None if it has none.

    Raises:
        ValueError: the class named RLD in the run directory is not this package's.
    """
    settings = run.config["loss"]
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        if class_name(str(part.get("_target_", ""))) == "RLDLoss":
            return _rld(run, part)
    return None


def default_rld(run: Run) -> RLDLoss:
    """``loss=rld`` for a run's pair: the defaults, with the values tuned in the pair's option of the model group.

    Raises:
        ValueError: these values are invalid.
    """
    tuned = (run.config["model"].get("tuned") or {}).get("rld") or {}
    if not isinstance(tuned, Mapping):
        raise ValueError(f"{run.folder} says model.tuned.rld={short_value(tuned)}, which are no options of a loss.")
    return _rld(run, {**tuned, "_target_": "rld_lightning.losses.RLDLoss"})


def _rld(run: Run, settings: Mapping[str, Any]) -> RLDLoss:
    loss = build_loss(run, settings)
    assert isinstance(loss, RLDLoss)  # build_loss only builds this package's losses
    return loss
