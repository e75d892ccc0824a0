"""The main job in miniature: a teacher, its student trained alone, and the student distilled, side by side."""

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from rld_lightning.console import console, print_error, print_files, print_table
from rld_lightning.models.complexity import count_macs, count_parameters, images_per_second
from rld_lightning.models.factory import create_model
from rld_lightning.models.read import read_weights
from rld_lightning.runs.summary import Summary
from rld_lightning.tasks.fit import fit

NO_SWEEP = "hydra.callbacks.sweep._target_=rld_lightning.tasks.quickstart.NoSweep"


class NoSweep(Callback):
    """In the place of :class:`~rld_lightning.tasks.sweep.Sweep`, whose options it takes: ends a sweep at its start."""

    def __init__(self, **_: Any) -> None: ...

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Says how to sweep.

        Raises:
            SystemExit: always.
        """
        print_error("the quickstart is one comparison and no sweep: use scripts/fit.py -m experiment=quickstart ...")
        sys.exit(2)


def quickstart(cfg: DictConfig) -> None:
    """Fits the student twice, with ``cfg.loss`` and with cross-entropy, and prints the comparison.

    The teacher is trained first when the store has none (``model.teacher.weights=fit``).

    Args:
        cfg: a configuration for :func:`~rld_lightning.tasks.fit.fit`.
    """
    run = Path(cfg.paths.run)
    distilled = _fit_in(cfg, run / "distilled")
    alone = deepcopy(cfg)
    alone.loss = {"_target_": "rld_lightning.losses.CELoss"}
    alone.method = "ce"
    alone.print_config = False
    alone = _fit_in(alone, run / "alone")

    rows = []
    if distilled.teacher is not None:
        rows.append(_row("teacher", distilled.teacher, distilled.teacher_top1, distilled))
    rows.append(_row("student, cross-entropy", alone.model, alone.top1, alone))
    rows.append(_row(f"student, {distilled.loss}", distilled.model, distilled.top1, distilled))
    columns = ("", "model", "top-1 %", "parameters", "M MACs", "images/s")
    print_table(f"{distilled.dataset}, last of {distilled.epochs} epochs", columns, rows)
    console.print("images/s: forward passes of 64 images on this machine", style="dim")
    for summary in (distilled, alone):
        print_files(Path(summary.run), {"curves.png": f"learning curves, {summary.loss}"})


def _fit_in(cfg: DictConfig, run: Path) -> Summary:
    cfg = deepcopy(cfg)
    cfg.paths.run = str(run)
    return fit(cfg)


def _row(what: str, name: str, top1: float | None, summary: Summary) -> tuple[object, ...]:
    metadata = read_weights(Path(summary.run) / "student.safetensors").metadata
    shape = tuple(json.loads(metadata["image_shape"]))
    model = create_model(name, int(metadata["num_classes"]))
    return what, name, top1, count_parameters(model), count_macs(model, shape) / 1e6, images_per_second(model, shape)
