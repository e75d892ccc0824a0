"""Reconstructs the teacher of a finished run from its directory."""

from collections.abc import Sequence
from contextlib import suppress

from rld_lightning.limits import LARGEST_SIDE
from rld_lightning.models.input_size import split_size
from rld_lightning.models.libraries import published_input
from rld_lightning.models.normalisation import parse_normalisation
from rld_lightning.models.teacher.torchscript_and_onnx import FOREIGN
from rld_lightning.models.weights.facts import WeightsFacts, facts_of
from rld_lightning.models.weights.read import read_weights, split_part
from rld_lightning.runs.finished import Run
from rld_lightning.tasks.run.plan import Teacher


def teacher_of(
    run: Run, file: str | None = None, option: str | None = "teacher=", *, classes_count: bool = True
) -> Teacher:
    """Returns the teacher of a finished run from its configuration, which may be untrusted.

    Args:
        file: its weights, if not where they were during training.
        option: the option that names the file, for messages; None if there is none.
        classes_count: whether its classes matter, and not only its size, for example.

    Raises:
        FileNotFoundError: its file does not exist.
        ValueError: there is none, or it is not one weights file of a network of this package or its libraries.
    """
    settings = run.config["model"].get("teacher")
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise ValueError(f"{run.folder} was trained without a teacher; choose a distilled run.")
    add = "" if option is None else f", or add {option}FILE"
    name, weights = settings["name"], settings.get("weights") if file is None else file
    if not isinstance(weights, str) or name in FOREIGN:
        kind = f"is a program ({name})" if name in FOREIGN else "is made of several"
        raise ValueError(
            f"the teacher of {run.folder} {kind}, which is not run here; choose a run with a teacher of one file "
            f"of weights{add}."
        )
    if weights != "pretrained" and not split_part(weights)[0].is_file():
        raise FileNotFoundError(f"the teacher's weights are not at {weights}; run from where the run was started{add}.")
    size, classes = settings.get("image_size"), settings.get("class_map")
    if classes is not None and not isinstance(classes, dict):
        if classes_count:
            raise ValueError(
                f"the teacher of {run.folder} has its classes in another file, {classes}, which is not read."
            )
        classes = None
    if not (size in (None, "auto") or (type(size) is int and 0 < size <= LARGEST_SIDE)):
        raise ValueError(f"{run.folder} says model.teacher.image_size={size!r}, which no run has.")
    return Teacher(
        name,
        weights,
        "",
        parse_normalisation(settings.get("mean"), settings.get("std")),
        {"fuse": False, "dtype": None},
        class_map=classes,
        image_size=size,
    )


def input_size(teacher: Teacher, given: tuple[int, int]) -> tuple[int, int]:
    """Returns height and width of a teacher's input in its run, given those of the data."""
    pretrained = teacher.weights == "pretrained"
    facts = WeightsFacts() if pretrained else facts_of(read_weights(str(teacher.weights)))
    return teacher_size(teacher, facts, given, pretrained=pretrained)


def input_shape_as_teacher(name: str, runs: Sequence[Run], given: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns a network's input shape as the teacher of one of the runs; ``given`` if it is no run's teacher."""
    for run in runs:
        if run.summary.teacher == name:
            with suppress(ValueError, OSError):  # for example its file is missing
                return (given[0], *input_size(teacher_of(run, classes_count=False), given[1:]))
    return given


def teacher_size(teacher: Teacher, facts: WeightsFacts, given: tuple[int, int], *, pretrained: bool) -> tuple[int, int]:
    """Returns height and width of a teacher's input: those of its training, as far as known.

    Args:
        pretrained: whether its weights are its library's.
    """
    if teacher.image_size is None or split_size(teacher.name)[1] is not None:  # resized by the network itself
        return given
    if teacher.image_size != "auto":
        return int(teacher.image_size), int(teacher.image_size)
    if pretrained and (published := published_input(teacher.name)) is not None:
        return published[2], published[2]
    return given if facts.image_shape is None else facts.image_shape[1:]
