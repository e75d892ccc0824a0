"""What a finished run folder gives to W&B: the table of classes, the student as an artifact, its teacher's lineage."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from omegaconf import DictConfig

from rld_lightning.models.read import WeightsError, read_metadata
from rld_lightning.runs.files import SUMMARY

if TYPE_CHECKING:
    from wandb import Artifact, Run

MODEL = "student.safetensors"  # the name of the weights in an artifact, a student's as a teacher's
ARTIFACT = "wandb_artifact"  # what a weights file calls the artifact that it is


def log_classes(run: "Run", folder: Path) -> None:
    """Logs ``classes.csv`` of a run folder as a table."""
    import wandb

    if (folder / "classes.csv").exists():
        run.log({"classes": wandb.Table(dataframe=pd.read_csv(folder / "classes.csv"))})


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
    student = wandb.Artifact(read_metadata(folder / MODEL)[ARTIFACT], "model", metadata=summary)
    # Not a copy in a folder of wandb's: the run folder keeps the file.
    student.add_file(str(folder / MODEL), policy="immutable", skip_cache=True)
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
    artifact.add_reference(path.as_uri(), name=MODEL, checksum=True)
    return artifact


def plain_name(name: str) -> str:
    """A name that an artifact may have."""
    return re.sub(r"[^\w.-]+", "-", name)[:128]
