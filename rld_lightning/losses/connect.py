"""A loss meets the networks that it will compare."""

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
        the student to train: the one given or, for a loss that reuses the teacher's classifier, one that ends in it.
    """
    if loss.reuses_classifier and isinstance(student, GraftedStudent):  # to be trained on
        student.classifier.load_state_dict(classifier_of(teacher).state_dict())
    elif loss.reuses_classifier:
        student = graft(student, teacher)
    loss.connect(student, teacher, image_shape, train_label)
    return student
