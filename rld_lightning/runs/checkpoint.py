"""The checkpoint from which a run resumes, and the previous one, which is used if the first is damaged."""

from collections.abc import Mapping
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rld_lightning.atomic_files import write_whole
from rld_lightning.models.weights.claims import load_safely, tensors_in
from rld_lightning.models.weights.read import read_once
from rld_lightning.models.weights.seal import is_damaged, seal_checkpoint

_KEY = "rld_lightning"  # key in a checkpoint, beside Lightning's


def previous_of(path: Path) -> Path:
    """Returns the path of the previous checkpoint: ``last.previous.ckpt``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def checkpoint_exists(path: Path) -> bool:
    """Whether a checkpoint exists, or a previous one."""
    return path.is_file() or previous_of(path).is_file()


def snapshot(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a checkpoint on the CPU, which does not change while training goes on."""
    copied = {id(tensor): tensor.detach().to("cpu", copy=True) for tensor in tensors_in(checkpoint)}
    # The rows of past epochs do not change, and there may be thousands of values.
    rows = checkpoint.get("metrics")
    return deepcopy(dict(checkpoint), {**copied, id(rows): rows})


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path, *, keep: bool) -> None:
    """Writes a checkpoint with a checksum, atomically.

    Args:
        keep: whether to keep the old file, under the name of :func:`previous_of`.

    Raises:
        OSError: it cannot be written; the old file is unchanged.
    """
    torch.save(checkpoint, saved := BytesIO())
    with seal_checkpoint(saved) as content:
        write_whole(path, content, previous=previous_of(path) if keep else None)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> tuple[dict[str, Any], Path]:
    """Reads a checkpoint as plain data, or the previous one if it is damaged or missing.

    Returns:
        its content, and the file that was read.

    Raises:
        FileNotFoundError: neither exists.
        ValueError: it is damaged or no checkpoint, and there is no previous one.
    """
    if not checkpoint_exists(path):
        raise FileNotFoundError(f"there is no checkpoint to resume from at {path}.")
    for candidate in (path, previous_of(path)):
        checkpoint = _load(candidate, map_location)
        if checkpoint is not None:
            return checkpoint, candidate
    weights = "to begin a new run with its weights, give it as model.student.weights"
    if not path.is_file():
        raise ValueError(
            f"{path} is gone, and {previous_of(path)} before it is damaged; start a new run in another folder."
        )
    if is_damaged(read_once(path)):
        raise ValueError(
            f"{path} is damaged: its bytes are not those that were written, by its checksum, and there is none before "
            f"it; take a copy of it, or start a new run in another folder."
        )
    raise ValueError(f"{path} is not a checkpoint to resume from; take a run's last.ckpt, or {weights}.")


def _load(path: Path, map_location: Any) -> dict[str, Any] | None:
    """Returns a checkpoint's content; None if it is missing or damaged."""
    if not path.is_file():
        return None
    content = read_once(path)
    if is_damaged(content):
        return None
    try:
        checkpoint = load_safely(content, map_location)
    except Exception:  # whatever a parser raises for other files
        return None
    return checkpoint if isinstance(checkpoint, dict) else None


class RunRecord(NamedTuple):
    """What a checkpoint records about its run, as plain text."""

    settings: dict[str, str]  # what decided the training, see `settings`
    teacher_sha256: str | None  # of the teacher's file; None without one

    @property
    def teacher(self) -> tuple[str | None, str | None]:
        """Name and file of the run's teacher."""
        return self.settings.get("model.teacher.name"), self.settings.get("model.teacher.weights")


def add_record(checkpoint: dict[str, Any], before: RunRecord) -> None:
    """Adds to a checkpoint what :func:`read_record` reads."""
    checkpoint[_KEY] = dict(before._asdict())


def read_record(checkpoint: Mapping[str, Any], path: Path) -> RunRecord:
    """Reads what a checkpoint, which may be untrusted, records about its run.

    Raises:
        ValueError: the record is missing or is not plain text.
    """
    found = checkpoint.get(_KEY)
    values = found.get("settings") if isinstance(found, dict) else None
    sha256 = found.get("teacher_sha256") if isinstance(found, dict) else None
    texts = [*values, *values.values()] if isinstance(values, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or not (sha256 is None or isinstance(sha256, str)):
        raise ValueError(f"{path} does not describe its run in plain text, and is not resumed from.")
    return RunRecord(dict(values or {}), sha256)
