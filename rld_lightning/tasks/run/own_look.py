"""Each network sees images as it was trained to, and classes in the order of the data."""

from torch import nn

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.models.classes import order_of, reorder_classes
from rld_lightning.models.input_size import split_size
from rld_lightning.models.libraries import published_input
from rld_lightning.models.normalisation import Look, published_look, trained_look
from rld_lightning.models.weights.beside import find_weights
from rld_lightning.models.weights.facts import WeightsFacts, facts_of
from rld_lightning.models.weights.read import Weights
from rld_lightning.models.weights.verify import load_weights
from rld_lightning.tasks.run.checks import check_classes, first_other
from rld_lightning.tasks.run.plan import Student, Teacher


def adopt_look(student: Student, data: ImageDataModule, *, chosen: bool) -> Look:
    """Has the data normalised as the student's weights want it, where it starts from any.

    The data themselves and not the student's input, so that everything that the run leaves says what it was fed with.

    Args:
        student: the network to train.
        data: the data, set up.
        chosen: whether the user has said what to normalise with; that stays, with a word of caution.

    Returns:
        what the data were normalised with before.
    """
    usual = Look(tuple(data.mean), tuple(data.std))
    if (side := split_size(student.name)[1]) is not None:
        print_line("student", "sees images of {0}x{0}, made of those of {1}x{2}".format(side, *data.image_shape[1:]))
    if student.weights == "pretrained":
        wanted = published_look(student.name)
    elif student.weights is not None:
        wanted = trained_look(facts_of(find_weights(student.weights)))
    else:
        wanted = None
    if wanted in (None, usual):
        return usual
    if chosen:
        print_line("caution", f"{student.name} was trained with {wanted}; data.mean and data.std say otherwise")
    else:
        data.normalize_with(*wanted)
        print_line("student", f"images are normalised with {wanted}, which its weights were trained with")
    return usual


def teacher_look(teacher: Teacher, facts: WeightsFacts, usual: Look, *, pretrained: bool) -> tuple[Look, str]:
    """What a teacher wants images normalised with, and who says so.

    Args:
        teacher: what it is.
        facts: what its file says.
        usual: what to take where nobody says anything.
        pretrained: whether its weights are its library's.
    """
    if teacher.look is not None:
        return teacher.look, "model.teacher.mean and std"
    published = published_look(teacher.name)
    if pretrained:
        return published or usual, "its library says so"
    if (trained := trained_look(facts)) is not None:
        return trained, "its file says so"
    if published not in (None, usual):
        print_line(
            "caution",
            f"the teacher's file does not say what images were normalised with, and {teacher.name} is published for "
            f"{published}; it gets {usual}, as the data have it: set model.teacher.mean and std for another",
        )
    return usual, "as the data have it"


def teacher_size(teacher: Teacher, facts: WeightsFacts, given: tuple[int, int], *, pretrained: bool) -> tuple[int, int]:
    """The height and width that a teacher wants images in: what it was trained with, as far as anybody says.

    Args:
        teacher: what it is.
        facts: what its file says.
        given: those of the data's images.
        pretrained: whether its weights are its library's.
    """
    if teacher.image_size is None or split_size(teacher.name)[1] is not None:  # it resizes them itself
        return given
    if teacher.image_size != "auto":
        return int(teacher.image_size), int(teacher.image_size)
    if pretrained and (published := published_input(teacher.name)) is not None:
        return published[2], published[2]
    return given if facts.image_shape is None else facts.image_shape[1:]


def load_in_order(network: nn.Module, name: str, path: str, data: ImageDataModule, role: str) -> Weights:
    """Loads a file into a network for the classes of the data, matched by name where the file names its own.

    Args:
        network: to fill, on the CPU.
        name: of the network.
        path: the file.
        data: the data, set up.
        role: what it is to be, ``"teacher"`` or ``"student"``.

    Returns:
        what was read.

    Raises:
        WeightsError: the file cannot be used, or is another network's.
        ValueError: it knows other classes.
    """
    weights = load_weights(network, path, name=name)
    if weights.account:
        print_line(role, f"weights {weights.account}")
    known, classes = facts_of(weights).class_names, list(data.class_names)
    if known is None or known == classes:
        return weights
    if (order := order_of(known, classes)) is None:
        check_classes(weights, data, f"move it away, or name another file with model.{role}.weights=")
    else:
        reorder_classes(network, name, order)
        print_line(role, f"its classes are matched to those of {data.name} by name{first_other(known, classes)}")
    return weights
