"""The checkpoint that a run goes on from, and the one before it, which is taken where the first is damaged."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rld_lightning.atomic_files import write_whole
from rld_lightning.models.weights.claims import load_plainly
from rld_lightning.models.weights.read import read_once
from rld_lightning.models.weights.seal import is_damaged, seal_checkpoint

_KEY = "rld_lightning"  # of a checkpoint, beside those of Lightning


def previous_of(path: Path) -> Path:
    """Where the checkpoint lies that was at ``path`` before the latest one: ``last.previous.ckpt``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def is_there(path: Path) -> bool:
    """Whether there is a checkpoint, or one before it."""
    return path.is_file() or previous_of(path).is_file()


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path, *, keep: bool) -> None:
    """Writes a checkpoint with a checksum; it appears whole or not at all.

    Args:
        keep: whether what was there stays under the name of :func:`previous_of`.

    Raises:
        OSError: it cannot be written; what was there is untouched.
    """
    torch.save(checkpoint, saved := BytesIO())
    write_whole(path, seal_checkpoint(saved), previous=previous_of(path) if keep else None)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> tuple[dict[str, Any], Path]:
    """Reads a checkpoint as data, or the one before it if it is damaged or gone.

    Returns:
        what is in it, and the file that it was read from.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or none, and there is no other before it.
    """
    if not is_there(path):
        raise FileNotFoundError(f"there is no checkpoint to resume from at {path}.")
    for candidate in (path, previous_of(path)):
        checkpoint = _load(candidate, map_location)
        if checkpoint is not None:
            return checkpoint, candidate
    weights = "to begin a new run with its weights, give it as model.student.weights"
    if not path.is_file():
        raise ValueError(
            f"{path} is gone, and {previous_of(path)} before it is damaged; begin again in another folder."
        )
    if is_damaged(read_once(path)):
        raise ValueError(
            f"{path} is damaged: its bytes are not those that were written, by its checksum, and there is none before "
            f"it; take a copy of it, or begin again in another folder."
        )
    raise ValueError(f"{path} is not a checkpoint to resume from; take a run's last.ckpt, or {weights}.")


def _load(path: Path, map_location: Any) -> dict[str, Any] | None:
    """What is in a checkpoint; None where there is none, or a damaged one."""
    if not path.is_file():
        return None
    content = read_once(path)
    if is_damaged(content):
        return None
    try:
        checkpoint = load_plainly(content, map_location)
    except Exception:  # whatever a file that is no checkpoint is taken for
        return None
    return checkpoint if isinstance(checkpoint, dict) else None


class Before(NamedTuple):
    """What a checkpoint says about the run that it is of, as plain text."""

    settings: dict[str, str]  # what decided what was trained, see `settings`
    teacher_sha256: str | None  # of the file of the run's teacher; None where there was none

    @property
    def teacher(self) -> tuple[str | None, str | None]:
        """The name and the file of the run's teacher."""
        return self.settings.get("model.teacher.name"), self.settings.get("model.teacher.weights")


def tell(checkpoint: dict[str, Any], before: Before) -> None:
    """Puts into a checkpoint what :func:`told` reads."""
    checkpoint[_KEY] = dict(before._asdict())


def told(checkpoint: Mapping[str, Any], path: Path) -> Before:
    """What a checkpoint says about its run. It may be a stranger's.

    Raises:
        ValueError: it says nothing, or something else than plain text.
    """
    found = checkpoint.get(_KEY)
    values = found.get("settings") if isinstance(found, dict) else None
    sha256 = found.get("teacher_sha256") if isinstance(found, dict) else None
    texts = [*values, *values.values()] if isinstance(values, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or not (sha256 is None or isinstance(sha256, str)):
        raise ValueError(f"{path} does not describe its run in plain text, and is not resumed from.")
    return Before(dict(values or {}), sha256)
