"""Benchmark of an epoch's time outside of its steps (validation, metrics, files): runs ``fit.py`` with short epochs."""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rld_lightning.bench.jobs import run_fit
from rld_lightning.bench.steps import machine
from rld_lightning.console import console, print_table
from rld_lightning.models.complexity import clock
from rld_lightning.models.factory import create_model
from rld_lightning.models.weights.save import save_weights

_STEPS = 8  # per epoch


class EpochTimes(Callback):
    """Writes a JSON file with the seconds of each step, between epochs, and of the validation's forward passes."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.steps: list[float] = []
        self.between: list[float] = []
        self.forward: list[float] = []
        self._ended: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Registers hooks that time the student's forward passes."""
        self._began, student = 0.0, cast("torch.nn.Module", pl_module.student)

        def begin(*_: Any) -> None:
            self._began = clock(trainer.strategy.root_device)

        def end(student: torch.nn.Module, *_: Any) -> None:
            if not student.training and self.forward:
                self.forward[-1] += clock(trainer.strategy.root_device) - self._began

        student.register_forward_pre_hook(begin)
        student.register_forward_hook(end)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Records the time since the last step of the previous epoch."""
        if batch_idx == 0 and self._ended is not None:
            self.between.append(clock(trainer.strategy.root_device) - self._ended)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records a step's time."""
        now = clock(trainer.strategy.root_device)
        if batch_idx > 1 and self._ended is not None:  # the first steps are warm-up
            self.steps.append(now - self._ended)
        self._ended = now
        if batch_idx == _STEPS - 1:
            self.forward.append(0.0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file."""
        self.path.write_text(json.dumps({"steps": self.steps, "between": self.between, "forward": self.forward}))


def bench_epoch(root: str, teacher: str, student: str, batch: int, epochs: int) -> None:
    """Trains on CIFAR-100 for a few short epochs, and prints the time outside of steps relative to a full epoch.

    Args:
        teacher: its network, with random weights; its logits are looked up from the second epoch on, if at all.
        epochs: at least 3, since the teacher evaluates the validation images between the first two.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights, times_file = Path(folder) / "teacher.safetensors", Path(folder) / "times.json"
        torch.manual_seed(0)
        save_weights(create_model(teacher, 100), weights, {"name": teacher, "num_classes": 100})
        run_fit([
            "data=cifar100", f"data.root={root}", f"data.batch_size={batch}", "model=pair",
            f"model.teacher.name={teacher}", f"model.student.name={student}", f"model.teacher.weights={weights}",
            "loss=rld", f"recipe.epochs={epochs}", f"trainer.limit_train_batches={_STEPS}",
            f"hydra.run.dir={folder}/run", f"paths.teachers={folder}",
            f"+callbacks.times={{_target_: rld_lightning.bench.epochs.EpochTimes, path: {times_file}}}",
        ])  # fmt: skip
        times = json.loads(times_file.read_text())
    steps = -(-50_000 // batch) * statistics.median(times["steps"])
    rows: list[tuple[str, float, float | None]] = [("steps", steps, None)]
    first, *later = zip(times["between"], times["forward"], strict=False)
    forward = statistics.median(own for _, own in later)
    rest = statistics.median(between - own for between, own in later)
    rows += [
        ("student's forward pass of the validation", forward, 100 * forward / steps),
        ("everything else between two epochs", rest, 100 * rest / steps),
        ("once per run: the teacher's forward pass of the validation", max(0.0, first[0] - first[1] - rest), None),
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print_table(
        f"an epoch of {teacher} to {student}, CIFAR-100, batch {batch}, on {machine(device)}",
        ("", "s per epoch", "% of the steps"),
        rows,
    )
    medians = f"medians of {len(times['steps'])} steps and {len(later)} epochs"
    console.print(f"{medians}; steps scaled to a full epoch", style="dim")
