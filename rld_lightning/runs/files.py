"""Names of the files in a run directory, and functions that write and read them."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from rld_lightning.atomic_files import write_whole
from rld_lightning.redact import redact

_LARGEST = 1_000_000  # bytes of a settings file; a run's has some thousands
_FORMULAS = ("=", "+", "-", "@", "\t")  # first characters of a formula in a spreadsheet
_SEXAGESIMAL = re.compile(rb"\d(:\d+){30}")  # YAML reads 1:30 as 90; a number of 100,000 digits takes hours

CONFIG = "config.yaml"  # resolved
ENVIRONMENT = "environment.json"  # versions and hardware
SUMMARY = "summary.json"  # results of a finished run
LOG = "fit.log"  # console output
METRICS = "metrics.csv"  # logged metrics, one row per epoch
SPLIT = "split.csv"  # split of each image of a folder
CLASSES = "classes.csv"  # accuracy per class
CONFUSION = "confusion.csv"  # number of images per true and predicted class
CURVES = "curves.png"
STUDENT = "student.safetensors"  # the exported student
_WEIGHTS = (STUDENT, "model.safetensors")  # in the directory of a run, and of an export
LAST = "last.ckpt"  # to resume from
PREVIOUS = "last.previous.ckpt"  # the previous one, in case that is damaged
BEST = "best.ckpt"
DIVERGED = "diverged.npz"  # the batch with a non-finite loss
ERROR = "error.txt"  # of a failed trial
PRINTED = "trial.log"  # output of a trial's processes, if the sweep prints its own lines
EVALUATION = "evaluation.json"  # of scripts/eval.py
PER_CLASS = "per_class.csv"  # of scripts/eval.py
EXPORTED = "export.json"  # comparison of an export's files, in its directory
NETWORKS = "networks.json"  # comparison of teacher, student alone and distilled student
NETWORKS_CLASSES = "networks.csv"  # their accuracies per class
SWEEP = "sweep.yaml"  # varied and fixed settings of a sweep, in the sweep's directory
SWEEPER = "multirun.yaml"  # the sweep's configuration, in its directory
STUDY = "study.db"  # of an Optuna sweep
TEACHER = "teacher"  # directory, within another run's, of the teacher trained for it
ALONE = "alone"  # the same of the student trained alone
HYDRA = ".hydra"  # Hydra's records
CHOICES = f"{HYDRA}/hydra.yaml"  # chosen options of the config groups
OVERRIDES = f"{HYDRA}/overrides.yaml"  # command-line overrides
WANDB_RUN = "wandb_run.json"  # id of the W&B run
WANDB = "wandb"  # wandb's files
LOCK = ".lock"  # of the training process


def weights_in(folder: Path) -> Path | None:
    """Returns the weights file in the directory of a run or an export; None if there is none."""
    return next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)


def run_of(weights: Path) -> Path:
    """Returns the run directory of a weights file: its own, or the one above for an export within a run."""
    folder = weights.parent
    is_export = (folder / EXPORTED).is_file() and not (folder / CONFIG).is_file()
    return folder.parent if is_export and (folder.parent / CONFIG).is_file() else folder


def split_of(run: Path) -> Path | None:
    """Returns the file with the split of each image of a folder; for a network within a run it is that run's."""
    folders = (run, run.parent) if run.absolute().name in (TEACHER, ALONE) else (run,)
    return next((folder / SPLIT for folder in folders if (folder / SPLIT).is_file()), None)


def write_csv(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Writes a table; creates its directory if needed.

    Args:
        columns: by name, of equal length.
    """
    writer = csv.writer(text := StringIO(), lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(map(plain_cell, column) for column in columns.values()), strict=True))
    write_whole(path, text.getvalue().encode())


def plain_cell(value: object) -> object:
    """Escapes cells that a spreadsheet would take for formulas or new lines: class names may be untrusted."""
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ")
    number = re.fullmatch(r"-|[+-]?\d+(\.\d*)?(e[+-]?\d+)?", text)
    return f"'{text}" if text.startswith(_FORMULAS) and not number else text


def text_of(cell: str) -> str:
    """Reverts :func:`plain_cell`: there are data sets with a class ``+``."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULAS) else cell


def write_json(path: Path, values: object) -> None:
    """Writes plain values as JSON; creates the directory if needed."""
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def write_yaml(path: Path, values: Any) -> None:
    """Writes plain values without secrets as YAML; keeps interpolations; creates the directory if needed."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(redact(values))).encode())


def check_file(path: Path) -> None:
    """Refuses files that would hang or exhaust the memory when read, such as pipes."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file. Move it away.")
    if path.stat().st_size > _LARGEST:
        raise ValueError(
            f"{path} has more than {_LARGEST:,} bytes, which no file of a run's settings has. Move it away."
        )


def read_text(path: Path) -> str:
    """Reads a text file of a run directory, which may be untrusted: limited in size, and no pipe."""
    if path.exists() and not path.is_file():
        return ""
    with path.open(errors="replace") as file:
        return file.read(_LARGEST)


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run.

    Raises:
        ValueError: it is not JSON.
    """
    check_file(path)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}. Move it away.") from error


def read_yaml(path: Path) -> Any:
    """Reads a YAML file of a run, already resolved: OmegaConf would take three times as long.

    Raises:
        ValueError: it is not YAML, or contains more than plain values.
    """
    check_file(path)
    loader, text = getattr(yaml, "CSafeLoader", yaml.SafeLoader), path.read_bytes()
    try:
        # Nested aliases expand a few lines to billions of values; a run writes none.
        if b"*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=loader)):
            raise ValueError(f"{path} has YAML aliases, which no run writes. Move it away.")
        if _SEXAGESIMAL.search(text):
            raise ValueError(f"{path} has a number with dozens of colons, which no run writes. Move it away.")
        return yaml.load(text, Loader=loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}. Move it away.") from error


def read_config(run: Path) -> Any:
    """Reads the configuration in a run directory, which may be untrusted, as plain values; nothing is instantiated.

    Raises:
        ValueError: it cannot be read; the caller checks that it is a complete configuration.
    """
    try:
        return read_yaml(run / CONFIG)
    except ValueError as error:
        raise ValueError(f"{run / CONFIG} is not the configuration of a run ({error}); move it away.") from error
