"""Networks and files of weights that a configuration names and that are not there; Lightning is not asked."""

from omegaconf import DictConfig, ListConfig

from rld_lightning.models.factory import check_name
from rld_lightning.models.registry import member_names
from rld_lightning.models.teacher.teacher_store import SOURCES, teacher_file
from rld_lightning.models.teacher.torchscript_and_onnx import FOREIGN
from rld_lightning.models.weights.read import existing_part
from rld_lightning.runs.naming import loss_name


def check_named(cfg: DictConfig) -> None:
    """Looks whether what a configuration names is there; nothing is fetched, and no file is opened.

    Raises:
        FileNotFoundError: a file is not there.
        ImportError: the library of a network is not installed.
        ValueError: a network is not known.
    """
    model = cfg.get("model") or {}
    student, teacher = model.get("student") or {}, model.get("teacher") or {}
    program = str(cfg.get("weights")).endswith(".onnx")  # which may be called anything
    files = teacher.get("weights")
    count = len(files) if isinstance(files, ListConfig) else 1
    of_teacher = member_names(teacher["name"], count) if teacher.get("name") is not None else ()
    for name in (*of_teacher, student.get("name"), None if program else cfg.get("name")):
        if name is not None and (name not in FOREIGN or name == student.get("name")):
            check_name(name)
    for weights in (student.get("weights"), teacher.get("start"), cfg.get("weights")):
        if weights not in (None, "pretrained"):
            existing_part(weights)
    if isinstance(files, str) and files not in SOURCES and loss_name(cfg.loss) != "CE":
        teacher_file(files)
