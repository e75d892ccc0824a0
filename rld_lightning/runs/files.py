"""The files in a run folder: their names, and how they are written and read."""

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

_LARGEST = 1_000_000  # bytes of a file of settings; a run's have some thousands
_FORMULAS = ("=", "+", "-", "@", "\t")  # what they begin with, to a spreadsheet
_SEXAGESIMAL = re.compile(rb"\d(:\d+){30}")  # 1:30 is 90 to YAML; reading one of 100,000 digits takes hours

CONFIG = "config.yaml"  # resolved
ENVIRONMENT = "environment.json"  # versions and hardware
SUMMARY = "summary.json"  # what a finished run came to
LOG = "fit.log"  # what was printed
METRICS = "metrics.csv"  # what was logged, one row an epoch
SPLIT = "split.csv"  # which image of a folder is in which split
CLASSES = "classes.csv"  # accuracy of each class
CONFUSION = "confusion.csv"  # how many images of a class were taken for which
CURVES = "curves.png"
STUDENT = "student.safetensors"  # the exported student
_WEIGHTS = (STUDENT, "model.safetensors")  # in the folder of a run, and of an export
LAST = "last.ckpt"  # to resume from
PREVIOUS = "last.previous.ckpt"  # the one before it, should that be damaged
BEST = "best.ckpt"
DIVERGED = "diverged.npz"  # which batch made the loss no number
ERROR = "error.txt"  # of a trial that failed
PRINTED = "trial.log"  # what a trial's processes have printed, where the sweep prints a line of its own
EVALUATION = "evaluation.json"  # of scripts/eval.py
PER_CLASS = "per_class.csv"  # likewise
EXPORTED = "export.json"  # how the files of an export compare, in its folder
NETWORKS = "networks.json"  # teacher, student alone and distilled student side by side
NETWORKS_CLASSES = "networks.csv"  # each class of theirs
SWEEP = "sweep.yaml"  # what a sweep varies and what it does not, in the sweep's folder
SWEEPER = "multirun.yaml"  # the configuration of a sweep, likewise
STUDY = "study.db"  # of an Optuna sweep
TEACHER = "teacher"  # the run folder, within another, of the teacher that was trained for it
ALONE = "alone"  # likewise of the student that was trained by itself
HYDRA = ".hydra"  # what Hydra notes
CHOICES = f"{HYDRA}/hydra.yaml"  # which options of the groups were chosen
OVERRIDES = f"{HYDRA}/overrides.yaml"  # what stood on the command line
WANDB_RUN = "wandb_run.json"  # which W&B run it is
WANDB = "wandb"  # what W&B keeps
LOCK = ".lock"  # of the process that trains


def weights_in(folder: Path) -> Path | None:
    """The file of weights in the folder of a run, or of an export; None where there is none."""
    return next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)


def run_of(weights: Path) -> Path:
    """The folder of the run that a file of weights is of: its own, or that above of an export in a run's folder."""
    folder = weights.parent
    is_export = (folder / EXPORTED).is_file() and not (folder / CONFIG).is_file()
    return folder.parent if is_export and (folder.parent / CONFIG).is_file() else folder


def split_of(run: Path) -> Path | None:
    """The file that says which image of a folder was in which split; of a network beside a run it is the run's."""
    folders = (run, run.parent) if run.absolute().name in (TEACHER, ALONE) else (run,)
    return next((folder / SPLIT for folder in folders if (folder / SPLIT).is_file()), None)


def write_csv(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Writes a table; its folder is made if need be.

    Args:
        columns: of one length, by name.
    """
    writer = csv.writer(text := StringIO(), lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(map(plain_cell, column) for column in columns.values()), strict=True))
    write_whole(path, text.getvalue().encode())


def plain_cell(value: object) -> object:
    """A value of a table that no spreadsheet takes for a formula or a new line: class names may be a stranger's."""
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ")
    number = re.fullmatch(r"-|[+-]?\d+(\.\d*)?(e[+-]?\d+)?", text)
    return f"'{text}" if text.startswith(_FORMULAS) and not number else text


def text_of(cell: str) -> str:
    """The text that :func:`plain_cell` has made a cell of: there are data sets with a class ``+``."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULAS) else cell


def write_json(path: Path, values: object) -> None:
    """Writes plain values; the folder is made if need be."""
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def write_yaml(path: Path, values: Any) -> None:
    """Writes plain values without secrets; interpolations stay what they are, and the folder is made if need be."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(redact(values))).encode())


def check_file(path: Path) -> None:
    """Refuses what would hang or fill the memory when it is read: a pipe, say."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file. Move it away.")
    if path.stat().st_size > _LARGEST:
        raise ValueError(
            f"{path} has more than {_LARGEST:,} bytes, which no file of a run's settings has. Move it away."
        )


def read_text(path: Path) -> str:
    """A text in a run folder, which may be a stranger's: no more of it than a run writes, nothing of a pipe."""
    if path.exists() and not path.is_file():
        return ""
    with path.open(errors="replace") as file:
        return file.read(_LARGEST)


def read_json(path: Path) -> Any:
    """What a run has written.

    Raises:
        ValueError: it is no JSON.
    """
    check_file(path)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}. Move it away.") from error


def read_yaml(path: Path) -> Any:
    """What a run has written, resolved: OmegaConf would take three times as long to read it.

    Raises:
        ValueError: it is no YAML, or more than plain values.
    """
    check_file(path)
    loader, text = getattr(yaml, "CSafeLoader", yaml.SafeLoader), path.read_bytes()
    try:
        # Nested aliases make billions of values of a few lines; a run writes none.
        if b"*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=loader)):
            raise ValueError(f"{path} has YAML aliases, which no run writes. Move it away.")
        if _SEXAGESIMAL.search(text):
            raise ValueError(f"{path} has a number with dozens of colons, which no run writes. Move it away.")
        return yaml.load(text, Loader=loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}. Move it away.") from error


def read_config(run: Path) -> Any:
    """The configuration in a run folder, which may be a stranger's: plain values, of which nothing is called.

    Raises:
        ValueError: it cannot be read as one; that it holds what a configuration does is the caller's to check.
    """
    try:
        return read_yaml(run / CONFIG)
    except ValueError as error:
        raise ValueError(f"{run / CONFIG} is not the configuration of a run ({error}); move it away.") from error
