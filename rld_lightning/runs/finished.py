"""Finished runs, read from their directories only."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rld_lightning.errors import malformed
from rld_lightning.models.registry import canonical_name
from rld_lightning.runs.files import (
    CHOICES,
    CONFIG,
    ENVIRONMENT,
    ERROR,
    OVERRIDES,
    SUMMARY,
    WANDB,
    check_file,
    read_json,
    read_yaml,
)
from rld_lightning.runs.naming import loss_name
from rld_lightning.runs.settings import SEEDS, settings
from rld_lightning.runs.summary import Summary, read_summary

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path  # the run directory
    summary: Summary  # the results
    config: dict[str, Any]  # resolved

    @property
    def pair(self) -> str:
        """The networks: ``wrn40_2_to_wrn16_2``, or the name of a single model."""
        return self.config["model"]["label"]

    @cached_property
    def method(self) -> str:
        """The option of the loss group, such as ``rld_ls``; ``rld+at`` for a combination."""
        if "method" in self.config:
            return self.config["method"]
        name = loss_name(self.config["loss"])
        return name.lower() if "+" in name else self.choices.get("loss", name.lower())

    @cached_property
    def choices(self) -> dict[str, str]:
        """The options of the config groups, such as ``{"recipe": "cifar240"}``; empty if unknown."""
        path = self.folder / CHOICES
        return read_yaml(path)["hydra"]["runtime"]["choices"] if path.exists() else {}

    @cached_property
    def settings(self) -> dict[str, str]:
        """All settings that decide the training, except the seed, as ``{"loss.alpha": "1", ...}``."""
        return {key: value for key, value in settings(self.config).items() if key not in SEEDS}

    @cached_property
    def metrics(self) -> "pd.DataFrame":
        """The table of :func:`~rld_lightning.runs.metrics_csv.read_metrics`."""
        from rld_lightning.runs.metrics_csv import read_metrics  # importing pandas takes a second

        return read_metrics(self.folder)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware."""
        return read_json(self.folder / ENVIRONMENT)

    @cached_property
    def overrides(self) -> list[str]:
        """The command-line overrides of ``scripts/fit.py``; empty if unknown.

        Paths below the current folder are given relative to it.
        """
        path = self.folder / OVERRIDES
        return [line.replace(f"={Path.cwd()}/", "=") for line in read_yaml(path)] if path.exists() else []


class Found(NamedTuple):
    """Run directories in and below some folders, ordered by path."""

    runs: list[Run]  # finished runs
    unfinished: list[Path]  # directories of runs that have started and not finished
    broken: list[tuple[Path, str]]  # directories of unreadable runs, with the reason


def read_run(folder: Path) -> Run:
    """Reads a finished run, whose directory may be untrusted.

    Raises:
        FileNotFoundError: the run is not finished, or this is no run directory.
        ValueError: one of its files is invalid, or lacks a value that readers rely on.
    """
    for name in (SUMMARY, CONFIG):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is not the directory of a finished run: it has no {name}.")
        check_file(folder / name)
    config = read_yaml(folder / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} is not the configuration of a run. Move it away.")
    _respell(config)
    run = Run(folder, read_summary(folder), config)
    try:
        usable = _is_usable(run)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder} is not a run directory: {malformed(error)}. Move it away.") from error
    if not usable:
        raise ValueError(f"{folder} is not a run directory: something in its files is of another kind. Move it away.")
    return run


def _is_usable(run: Run) -> bool:
    """Whether a run has all that readers rely on, of the right type. (The summary was checked when it was read.)"""
    summary, networks = run.summary, run.config["model"]
    texts = [summary.model, summary.dataset, summary.validated_on, summary.run, run.pair, run.method]
    texts += [networks["student"]["name"], *run.settings, *run.overrides, *run.choices]
    if summary.teacher or networks.get("teacher"):
        texts += [networks["teacher"]["name"], str(networks["teacher"]["weights"])]
    mappings = [run.choices, run.config["data"], run.config["loss"], networks.get("tuned") or {}]
    mappings += [run.environment] if (run.folder / ENVIRONMENT).exists() else []
    return all(isinstance(text, str) and "\0" not in text for text in texts) and all(
        isinstance(mapping, dict) for mapping in mappings
    )


def _respell(config: dict[str, Any]) -> None:
    """Normalises the network names in a run's configuration, which may be spelled otherwise on the command line."""
    model = config.get("model")
    for part in [model.get("teacher"), model.get("student")] if isinstance(model, dict) else []:
        if isinstance(part, dict) and isinstance(part.get("name"), str):
            part["name"] = canonical_name(part["name"])


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads the finished runs in and below some folders, ordered by path.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a run's files cannot be read.
    """
    found = find_all(folders)
    if found.broken:
        raise ValueError(found.broken[0][1])
    return found.runs


def find_all(folders: Sequence[Path]) -> Found:
    """Like :func:`find_runs`, but also returns the directories of unfinished and unreadable runs.

    Skips runs with ``fast_dev_run``.
    """
    found = Found([], [], [])
    for path in _below(folders):
        if not (path / SUMMARY).exists():
            found.unfinished.append(path)
            continue
        try:
            run = read_run(path)
            if not run.summary.fast_dev_run:
                found.runs.append(run)
        except (OSError, ValueError) as error:
            found.broken.append((path, str(error)))
    return found


def _below(folders: Sequence[Path]) -> Iterator[Path]:
    """Yields all run directories, each once."""
    found = set()
    for top in folders:
        if not top.is_dir():
            raise FileNotFoundError(f"{top} is not a folder; give folders that hold runs, such as runs/.")
        for path, inner, files in os.walk(top):
            inner[:] = [name for name in inner if not name.startswith(".")]
            if CONFIG in files and WANDB in inner:  # wandb's config.yaml is not a run's
                inner.remove(WANDB)
            if CONFIG in files or ERROR in files:  # a trial may fail before it writes its settings
                found.add(Path(path))
    return iter(sorted(found))
