"""The names of the files in a run folder, and how tables are written there."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

CONFIG = "config.yaml"  # resolved
ENVIRONMENT = "environment.json"  # versions and hardware
SUMMARY = "summary.json"  # what a finished run came to
METRICS = "metrics.csv"  # every logged value
EARLIER_METRICS = "metrics_earlier.csv"  # of a run that goes on in its own folder
CLASSES = "classes.csv"  # accuracy of each class
CURVES = "curves.png"
STUDENT = "student.safetensors"  # the exported student
LAST = "last.ckpt"  # to resume from
BEST = "best.ckpt"
ERROR = "error.txt"  # of a trial that failed
EVALUATION = "evaluation.json"  # of scripts/eval.py
PER_CLASS = "per_class.csv"  # likewise
SWEEP = "sweep.yaml"  # what a sweep varies and what it does not, in the sweep's folder
STUDY = "study.db"  # of an Optuna sweep
TEACHER = "teacher"  # the run folder, within another, of the teacher that was trained for it
HYDRA = ".hydra"  # what Hydra notes
CHOICES = f"{HYDRA}/hydra.yaml"  # which options of the groups were chosen
OVERRIDES = f"{HYDRA}/overrides.yaml"  # what stood on the command line
WANDB = "wandb"  # what W&B keeps
LOCK = ".lock"  # of the process that trains


def write_csv(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Writes a table; its folder is made if need be.

    Args:
        path: the file.
        columns: of one length, by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
