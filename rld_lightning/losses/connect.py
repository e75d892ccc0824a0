"""Connects a loss to the student and the teacher."""

from collections.abc import Sequence

from torch import Tensor, nn

from rld_lightning.losses.base import DistillationLoss
from rld_lightning.models.graft import GraftedStudent, graft
from rld_lightning.models.stages import classifier_of


def connect(
    loss: DistillationLoss, student: nn.Module, teacher: nn.Module, image_shape: Sequence[int], train_label: Tensor
) -> nn.Module:
    """Connects a loss to both networks.

    Returns:
        the student to train: the given one or, if the loss reuses the teacher's classifier, one that ends in it.
    """
    if loss.reuses_classifier and isinstance(student, GraftedStudent):  # training continues from its weights
        student.classifier.load_state_dict(classifier_of(teacher).state_dict())
    elif loss.reuses_classifier:
        student = graft(student, teacher)
    loss.connect(student, teacher, image_shape, train_label)
    return student
