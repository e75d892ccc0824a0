"""The teacher of a finished run, as its folder describes it."""

from rld_lightning.models.normalisation import look_of
from rld_lightning.models.teacher.torchscript_and_onnx import FOREIGN
from rld_lightning.models.weights.read import split_part
from rld_lightning.runs.finished import Run
from rld_lightning.tasks.run.plan import Teacher


def teacher_of(run: Run, file: str | None = None, option: str = "teacher=") -> Teacher:
    """The teacher of a finished run, as its configuration describes it, which is a stranger's perhaps.

    Args:
        run: a finished run.
        file: its weights, if not where they lay when the run was trained.
        option: what names the file, for messages.

    Raises:
        FileNotFoundError: its file is not there.
        ValueError: there is none, or it is not one file of weights of a network of this package or its libraries.
    """
    settings = run.config["model"].get("teacher")
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise ValueError(f"{run.folder} was trained without a teacher; choose a distilled run.")
    name, weights = settings["name"], settings.get("weights") if file is None else file
    if not isinstance(weights, str) or name in FOREIGN:
        kind = f"is a program ({name})" if name in FOREIGN else "is made of several"
        raise ValueError(
            f"the teacher of {run.folder} {kind}, which is not run here; choose a run with a teacher of one file "
            f"of weights, or add {option}FILE."
        )
    if weights != "pretrained" and not split_part(weights)[0].is_file():
        raise FileNotFoundError(
            f"the teacher's weights are not at {weights}; run from where the run was started, or add {option}FILE."
        )
    size, classes = settings.get("image_size"), settings.get("class_map")
    if classes is not None and not isinstance(classes, dict):
        raise ValueError(f"the teacher of {run.folder} has its classes in another file, {classes}, which is not read.")
    if not (size in (None, "auto") or (type(size) is int and 0 < size <= 4096)):
        raise ValueError(f"{run.folder} says model.teacher.image_size={size!r}, which no run has.")
    return Teacher(
        name,
        weights,
        "",
        look_of(settings.get("mean"), settings.get("std"), "model.teacher"),
        {"fuse": False, "dtype": None},
        class_map=classes,
        image_size=size,
    )
