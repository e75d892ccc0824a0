"""What a finished run folder gives to W&B: the table of classes, the student as an artifact, its teacher's lineage."""

import csv
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from rld_lightning.models.read import WeightsError, read_metadata
from rld_lightning.runs.files import CLASSES, STUDENT, SUMMARY

if TYPE_CHECKING:
    from wandb import Artifact, Run

ARTIFACT = "wandb_artifact"  # what a weights file calls the artifact that it is


def log_classes(run: "Run", folder: Path) -> None:
    """Logs ``classes.csv`` of a run folder as a table."""
    import wandb

    path = folder / CLASSES
    if path.exists():
        with path.open(newline="") as file:
            columns, *rows = csv.reader(file)
        cells = map(_numbers, zip(*rows, strict=True))
        run.log({"classes": wandb.Table(columns=[*columns], data=[list(row) for row in zip(*cells, strict=True)])})


def _numbers(column: Sequence[str]) -> Sequence[int | float | str]:
    """A column of a CSV file as numbers, an empty cell as NaN; as it is where some are none."""
    with suppress(ValueError):
        return [int(cell) for cell in column]
    with suppress(ValueError):
        return [float(cell or "nan") for cell in column]
    return column


def log_models(run: "Run", folder: Path, teacher: DictConfig | None) -> None:
    """Logs the exported student as an artifact of the run, with the summary as metadata, and its teacher as an input.

    A teacher that was a run logged to W&B is the very artifact that run has left: its file says the artifact's name,
    and the same content is the same version. Another one becomes an artifact ``teacher-<name>``, by checksum and path
    alone; weights that come with a package have no file, and no artifact.

    Args:
        run: the W&B run.
        folder: the run folder.
        teacher: ``model.teacher`` of the configuration.
    """
    import wandb

    if teacher is not None and Path(str(teacher.weights)).is_file():
        artifact = _teacher(Path(teacher.weights).absolute(), teacher.name)
        # What run.use_artifact() does, which refuses to do it offline, and online waits until the server has it.
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    summary = json.loads((folder / SUMMARY).read_text())
    student = wandb.Artifact(read_metadata(folder / STUDENT)[ARTIFACT], "model", metadata=summary)
    # Not a copy in a folder of wandb's: the run folder keeps the file.
    student.add_file(str(folder / STUDENT), policy="immutable", skip_cache=True)
    run.log_artifact(student, aliases=["latest", f"seed{summary['seed']}"])


def _teacher(path: Path, name: str) -> "Artifact":
    import wandb

    try:
        facts = read_metadata(path)
    except WeightsError:  # another format
        facts = {}
    artifact = wandb.Artifact(
        facts.get(ARTIFACT) or plain_name(f"teacher-{name}"), "model", metadata={"path": str(path), **facts}
    )
    artifact.add_reference(path.as_uri(), name=STUDENT, checksum=True)
    return artifact


def plain_name(name: str) -> str:
    """A name that an artifact may have."""
    return re.sub(r"[^\w.-]+", "-", name)[:128]
