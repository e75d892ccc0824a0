"""Finished runs as tables and figures read them: from their folders alone."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from rld_lightning.config import flat, loss_name

SUMMARY = "summary.json"
ERROR = "error.txt"  # of a trial that failed
RECORD = "sweep.yaml"  # of what a sweep varies and what it does not, in its folder
# What does not decide what is trained: places, watching, and how the work is shared out.
_NOT_SETTINGS = (
    *("method", "paths", "logger", "callbacks", "print_config", "resume"),
    *(f"data.{key}" for key in ("root", "cache", "cache_gb", "bad_images_file", "num_workers", "eval_batch_size")),
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy", "default_root_dir")),
    *(f"trainer.{key}" for key in ("check_val_every_n_epoch", "log_every_n_steps", "num_sanity_val_steps")),
    "trainer.enable_model_summary",
)
_SEEDS = ("seed", "data.seed")
_FILES = ("model.teacher.weights", "model.student.weights")
_NO_FILES = ("None", "auto", "fit", "pretrained", "published")


@dataclass(frozen=True)
class Summary:
    """What a finished run came to; written as ``summary.json``. Accuracy in percent.

    ``top1`` is the last epoch's, ``top1_best`` the best epoch's, on ``validated_on``; tables in the literature print
    the best epoch on the test split.
    """

    model: str
    loss: str
    dataset: str
    validated_on: str
    epochs: int
    seed: int
    top1: float
    top1_best: float
    top5: float | None
    ce: float
    teacher: str | None
    teacher_top1: float | None
    agreement: float | None
    parameters: int
    macs: int
    images_per_s: float | None
    run: str

    def write(self, run: Path) -> None:
        """Leaves it in the run's folder."""
        (run / SUMMARY).write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_summary(run: Path) -> Summary:
    """Reads a run's summary; what other versions of this package have written beside is left out.

    Raises:
        ValueError: it is not a summary.
    """
    try:
        values = json.loads((run / SUMMARY).read_text())
        return Summary(**{field.name: values[field.name] for field in fields(Summary)})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{run / SUMMARY} is not the summary of a run: {error!r}. Move it away.") from error


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: where it lies.
        summary: what it came to.
        config: its resolved configuration.
    """

    folder: Path
    summary: Summary
    config: dict[str, Any]

    @property
    def pair(self) -> str:
        """What was trained: ``wrn40_2_to_wrn16_2``, or the name of a single model."""
        return self.config["model"]["label"]

    @cached_property
    def method(self) -> str:
        """The option of the loss group, such as ``rld_ls``; ``rld+at`` of a combination."""
        if "method" in self.config:
            return self.config["method"]
        name = loss_name(self.config["loss"])
        return name.lower() if "+" in name else self.choices.get("loss", name.lower())

    @cached_property
    def choices(self) -> dict[str, str]:
        """The options of the configuration groups, such as ``{"recipe": "cifar240"}``; empty if they are not known."""
        path = self.folder / ".hydra" / "hydra.yaml"
        return _read_yaml(path)["hydra"]["runtime"]["choices"] if path.exists() else {}

    @cached_property
    def settings(self) -> dict[str, str]:
        """Everything that decides what was trained but the seed, as ``{"loss.alpha": "1", ...}``."""
        return {key: value for key, value in _settings(self.config).items() if key not in _SEEDS}

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """:func:`read_metrics` of the folder."""
        return read_metrics(self.folder)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware."""
        return json.loads((self.folder / "environment.json").read_text())

    @cached_property
    def overrides(self) -> list[str]:
        """What stood on the command line behind ``scripts/fit.py``; empty where that is not known.

        Paths below the current folder are relative to it, as one would write them.
        """
        path = self.folder / ".hydra" / "overrides.yaml"
        return [line.replace(f"={Path.cwd()}/", "=") for line in _read_yaml(path)] if path.exists() else []


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The settings, seeds included, in which two resolved configurations differ, with both values of each.

    Where things lie, what watches a run and on how many devices it runs do not count; nor do settings that one of the
    two does not have, which another version of this package may have added.
    """
    ours, theirs = _settings(first), _settings(second)
    return {key: (ours[key], theirs[key]) for key in ours if key in theirs and ours[key] != theirs[key]}


def decides(key: str) -> bool:
    """Whether a key of the configuration decides what is trained, as ``loss.alpha`` does and ``logger`` does not."""
    return not any(f"{key}.".startswith(f"{name}.") for name in _NOT_SETTINGS)


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    return {key: canonical(key, value) for key, value in flat(config).items() if decides(key)}


def canonical(key: str, value: str) -> str:
    """The same text for the same value: ``1`` for the ``1.0`` of a file, a whole path for a file of weights."""
    if key in _FILES and value not in _NO_FILES:
        return str(Path(value).absolute())
    return re.sub(r"^(-?\d+)\.0$", r"\1", value)


def read_run(folder: Path) -> Run:
    """Reads a finished run.

    Args:
        folder: the run's folder.

    Raises:
        FileNotFoundError: the run is not finished, or this is not the folder of one.
        ValueError: its summary is not one.
    """
    for name in (SUMMARY, "config.yaml"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is not the folder of a finished run: it has no {name}.")
    return Run(folder, read_summary(folder), _read_yaml(folder / "config.yaml"))


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads the finished runs in and below some folders, ordered by path.

    Args:
        folders: where to look.

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: a summary is not one.
    """
    return find_all(folders)[0]


def find_all(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """:func:`find_runs`, and the folders of runs that have begun and not ended."""
    runs, unfinished = [], []
    for path in _below(folders):
        if (path / SUMMARY).exists():
            runs.append(read_run(path))
        else:
            unfinished.append(path)
    return runs, unfinished


def _read_yaml(path: Path) -> Any:
    """What a run has written, resolved: OmegaConf would take three times as long to read it."""
    return yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _below(folders: Sequence[Path]) -> Iterator[Path]:
    """All folders of runs, each once."""
    found = set()
    for top in folders:
        if not top.is_dir():
            raise FileNotFoundError(f"{top} is not a folder; give folders that hold runs, such as runs/.")
        for path, inner, files in os.walk(top):
            inner[:] = [name for name in inner if not name.startswith(".")]
            if "config.yaml" in files and "wandb" in inner:  # where W&B keeps a config.yaml of its own
                inner.remove("wandb")
            if "config.yaml" in files or ERROR in files:  # a trial may fail before it has written its settings
                found.add(Path(path))
    return iter(sorted(found))


def read_metrics(run: Path) -> pd.DataFrame:
    """The values logged at the end of epochs, one row an epoch (counted from 1), one column a metric.

    Args:
        run: a run folder with a ``metrics.csv``.
    """
    rows = pd.read_csv(run / "metrics.csv")
    columns = [name for name in rows if name.startswith(("train/", "val/", "stats/"))]
    epochs = rows.groupby("epoch")[columns].last()
    epochs.index += 1
    return epochs.dropna(axis=1, how="all")
