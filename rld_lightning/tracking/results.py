"""Logs a finished run directory to W&B: the table of classes, the student as an artifact, its teacher's lineage."""

import csv
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig

from rld_lightning.models.weights.read import WeightsError, read_metadata, read_weights, split_part
from rld_lightning.models.weights.save import save_weights
from rld_lightning.runs.files import BEST, CLASSES, CONFUSION, STUDENT, SUMMARY, WANDB, text_of

if TYPE_CHECKING:
    from wandb import Artifact, Run

MOST_CELLS = 10_000  # cells of a table that W&B draws
ARTIFACT = "wandb_artifact"  # key in a weights file for the name of its artifact
_OF_LAST_EPOCH = ("top5", "ce", "agreement")  # of a summary, not kept of the best epoch


def log_classes(run: "Run", folder: Path) -> None:
    """Logs ``classes.csv`` of a run directory as a table."""
    import wandb

    path = folder / CLASSES
    if path.exists():
        with path.open(newline="") as file:
            columns, *rows = csv.reader(file)
        cells = map(_numbers, zip(*([text_of(cell) for cell in row] for row in rows), strict=True))
        run.log({"classes": wandb.Table(columns=[*columns], data=[list(row) for row in zip(*cells, strict=True)])})


def log_confusion(run: "Run", folder: Path) -> None:
    """Logs ``confusion.csv`` of a run directory as a confusion matrix."""
    import wandb

    path = folder / CONFUSION
    if not path.exists():
        return
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    named = ((text_of(actual), text_of(predicted), int(count)) for actual, predicted, count in rows)
    cells = sorted(named, key=lambda cell: -cell[2])
    table = wandb.Table(columns=["actual", "predicted", "images"], data=[list(cell) for cell in cells[:MOST_CELLS]])
    fields = {"Actual": "actual", "Predicted": "predicted", "nPredictions": "images"}
    title = {"title": "confusion matrix, last validation"}
    run.log({"confusion": wandb.plot_table("wandb/confusion_matrix/v1", table, fields, title)})


def _numbers(column: Sequence[str]) -> Sequence[int | float | str]:
    """Converts a CSV column to numbers, empty cells to NaN; returns it unchanged if a cell is not a number."""
    with suppress(ValueError):
        return [int(cell) for cell in column]
    with suppress(ValueError):
        return [float(cell or "nan") for cell in column]
    return column


def log_models(run: "Run", folder: Path, teacher: DictConfig | None) -> None:
    """Logs the students as versions of one artifact, with the summary as metadata, and their teacher as an input.

    The exported student, of the last epoch, has the aliases ``last`` and ``latest``; the best epoch's has ``best``,
    which may be the same version.

    If the teacher's run was logged to W&B, the teacher is that run's artifact: its file contains the artifact's name,
    and equal content is the same version. Any other becomes an artifact ``teacher-<data set>-<name>``, with checksum
    and path only; weights that come with a package have neither a file nor an artifact.
    """
    summary = json.loads((folder / SUMMARY).read_text())
    if teacher is not None and (file := split_part(str(teacher.weights))[0]).is_file():
        artifact = _teacher(file.absolute(), teacher.name, summary["dataset"])
        # Like run.use_artifact(), which fails offline and, online, waits until the server has the artifact.
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    aliases = ["latest", "last", f"seed{summary['seed']}"]
    last = read_weights(folder / STUDENT)
    best = read_weights(folder / BEST) if (folder / BEST).exists() else last
    a, b = best.state_dict, last.state_dict
    if a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a):
        aliases.append("best")
    else:
        path = folder / WANDB / "best" / STUDENT
        facts = last.metadata | {"top1": str(summary["top1_best"])}
        save_weights(best.state_dict, path, facts)
        known = {name: value for name, value in summary.items() if name not in _OF_LAST_EPOCH}
        _log_student(run, path, known | {"top1": summary["top1_best"]}, ["best"])
    _log_student(run, folder / STUDENT, summary, aliases)


def _log_student(run: "Run", path: Path, summary: dict[str, object], aliases: list[str]) -> None:
    import wandb

    student = wandb.Artifact(read_metadata(path)[ARTIFACT], "model", metadata=summary)
    # No copy in wandb's directory: the run directory keeps the file.
    student.add_file(str(path), name=STUDENT, policy="immutable", skip_cache=True)
    run.log_artifact(student, aliases=aliases)


def _teacher(path: Path, name: str, dataset: str) -> "Artifact":
    import wandb

    try:
        facts = read_metadata(path)
    except WeightsError:  # another file format
        facts = {}
    own = artifact_name(f"teacher-{dataset}-{name}")
    artifact = wandb.Artifact(facts.get(ARTIFACT) or own, "model", metadata={"path": str(path), **facts})
    artifact.add_reference(path.as_uri(), name=STUDENT, checksum=True)
    return artifact


def artifact_name(name: str) -> str:
    """Replaces characters that artifact names must not contain."""
    return re.sub(r"[^\w.-]+", "-", name)[:128]
