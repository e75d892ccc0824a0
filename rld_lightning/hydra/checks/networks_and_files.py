"""Checks that the networks and weights files of a configuration exist, without importing Lightning."""

from omegaconf import DictConfig, ListConfig

from rld_lightning.models.factory import check_name
from rld_lightning.models.registry import member_names
from rld_lightning.models.teacher.teacher_store import SOURCES, teacher_file
from rld_lightning.models.teacher.torchscript_and_onnx import FOREIGN
from rld_lightning.models.weights.read import existing_part
from rld_lightning.runs.naming import loss_name


def check_named(cfg: DictConfig) -> None:
    """Checks that the named networks and files exist; downloads nothing and opens no file.

    Raises:
        FileNotFoundError: a file does not exist.
        ImportError: the library of a network is not installed.
        ValueError: a network's name is unknown.
    """
    model = cfg.get("model") or {}
    student, teacher = model.get("student") or {}, model.get("teacher") or {}
    program = str(cfg.get("weights")).endswith(".onnx")  # whose name need not be a network's
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
