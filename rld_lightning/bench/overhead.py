"""Benchmark of a step's overhead beside its kernels, for which a fast GPU waits: trains a network of one layer."""

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from rld_lightning.bench.jobs import run_fit
from rld_lightning.bench.steps import machine
from rld_lightning.console import console, print_table

_BATCH = 16
_STEPS = 90  # of an epoch of digits
_WARM_UP = 20


def one_layer(num_classes: int) -> nn.Module:
    """Creates the smallest classifier: a linear one of the mean colour."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))


class StepClock(Callback):
    """Records the end of each training step in seconds: the main thread's CPU time, and wall time.

    Args:
        path: a JSON file to write both to at the end of training; None to write none.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Records both times."""
        self.record()

    def record(self) -> None:
        """Records both times."""
        self.cpu.append(time.thread_time())
        self.wall.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file."""
        if self.path is not None:
            self.path.write_text(json.dumps([self.cpu, self.wall]))


class _Bare(LightningModule):
    """The same step in Lightning, without callbacks and loggers."""

    def __init__(self) -> None:
        super().__init__()
        self.network = one_layer(10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedule = OneCycleLR(optimizer, 0.05, total_steps=_STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def bench_overhead(device: torch.device, rounds: int) -> None:
    """Trains in a plain loop, in Lightning and with ``fit.py`` in turn, and prints the times of a step."""
    contenders = {"plain loop": _loop, "Lightning, no callbacks": _lightning, "fit.py loss=ce": _fit}
    times_by_contender: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name, run in contenders.items():
            clock = run(device)
            times_by_contender.setdefault(name, []).append((_median_step(clock.cpu), _median_step(clock.wall)))
    rows: list[tuple[str, float, str, float]] = []
    for name, times in times_by_contender.items():
        cpu = [1e3 * seconds for seconds, _ in times]
        wall = statistics.median(1e3 * seconds for _, seconds in times)
        rows.append((name, statistics.median(cpu), f"{min(cpu):.2f} to {max(cpu):.2f}", wall))
    print_table(
        f"A step of one layer, batch {_BATCH}, on {machine(device)}",
        ("", "ms of CPU, median", "of the rounds", "ms"),
        rows,
    )
    console.print(f"{rounds} rounds in alternation, of each the median step", style="dim")


def _median_step(times: list[float]) -> float:
    """Returns the median seconds of a step after the warm-up."""
    return statistics.median(after - before for before, after in pairwise(times[_WARM_UP:]))


class _Batches:
    """Repeats one batch, so that loading takes no time."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(_BATCH, 3, 8, 8, generator=generator)
        self.batch = images.to(device), torch.randint(10, (_BATCH,), generator=generator).to(device)

    def __len__(self) -> int:
        return _STEPS

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return repeat(self.batch, _STEPS)


def _loop(device: torch.device) -> StepClock:
    module, clock = _Bare().to(device), StepClock()
    settings = module.configure_optimizers()
    for number, batch in enumerate(_Batches(device)):
        with torch.autocast(device.type, torch.bfloat16):
            loss = module.training_step(batch, number)
        settings["optimizer"].zero_grad()
        loss.backward()
        settings["optimizer"].step()
        settings["lr_scheduler"]["scheduler"].step()
        clock.record()
    return clock


def _lightning(device: torch.device) -> StepClock:
    clock = StepClock()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1,
            precision="bf16-mixed",
            callbacks=[clock],
            default_root_dir=folder,
            **dict.fromkeys(off, False),  # type: ignore[arg-type]
        )
        trainer.fit(_Bare(), _Batches(device))
    return clock


def _fit(device: torch.device) -> StepClock:
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.json"
        run_fit([
            "data=digits", f"data.batch_size={_BATCH}", "loss=ce", "recipe=quick",
            f"model.student.name={__name__}:{one_layer.__name__}", "recipe.epochs=1", "trainer.precision=bf16-mixed",
            f"trainer.accelerator={'gpu' if device.type == 'cuda' else device.type}", f"hydra.run.dir={folder}/run",
            f"+callbacks.clock={{_target_: {__name__}.{StepClock.__name__}, path: {times}}}",
        ])  # fmt: skip
        clock = StepClock()
        clock.cpu, clock.wall = json.loads(times.read_text())
    return clock
