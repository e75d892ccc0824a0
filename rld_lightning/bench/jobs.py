"""Whole jobs, from pressing Enter: ``scripts/fit.py`` with all that it watches and logs, against a plain trainer."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rld_lightning.bench.steps import machine
from rld_lightning.console import console, print_table
from rld_lightning.models.complexity import count_macs
from rld_lightning.models.factory import create_model
from rld_lightning.models.save import save_weights
from rld_lightning.shipped import shipped

SCRIPT = shipped("scripts") / "fit.py"
DATA = {"cifar100": (100, (3, 32, 32)), "digits": (10, (3, 8, 8))}


class StepTimes(Callback):
    """Leaves the time at which each training step had ended in a file.

    Args:
        path: the file, JSON.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.ended: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Looks at the clock."""
        self.ended.append(time.time())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file."""
        self.path.write_text(json.dumps(self.ended))


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        data: ``cifar100`` or ``digits``.
        root: folder of CIFAR-100.
        teacher: its network.
        student: its network.
        batch: images a step.
        steps: how many.
    """

    data: str
    root: str
    teacher: str
    student: str
    batch: int
    steps: int


def bench_fit(job: Job, rounds: int, switches: Sequence[str], report: Path | None) -> None:
    """Runs both in turn, each a fresh process, and prints their medians and the limit of this machine.

    Args:
        job: what is trained; the teacher's weights are random.
        rounds: how often each runs.
        switches: for each further contender of ours, its overrides, such as ``"model.teacher.cache=false"``.
        report: a file for the same as JSON.
    """
    contenders: dict[str, list[str] | None] = {"plain trainer": None, "fit.py": []}
    contenders |= {f"fit.py {switch}": switch.split() for switch in switches}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    classes, shape = DATA[job.data]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        teacher = Path(folder) / "teacher.safetensors"
        save_weights(create_model(job.teacher, classes), teacher, {"name": job.teacher, "num_classes": classes})
        for number in range(rounds):
            for name, overrides in contenders.items():
                place = Path(folder) / f"{len(found[name])}-{number}-{len(name)}"
                command = _plain(job) if overrides is None else [*_ours(job, teacher, place), *overrides]
                found[name].append(_time(command, place, overrides is None, job))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    base = medians["plain trainer"]
    rows = [
        (name, m["images_per_s"], m["images_per_s"] / base["images_per_s"], m["first_step_s"], m["whole_s"])
        for name, m in medians.items()
    ]
    limits = _limits(job, classes, shape)
    rows += [
        (f"limit: {kind} matrices", value, value / base["images_per_s"], 0.0, 0.0) for kind, value in limits.items()
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print_table(
        f"{job.teacher} to {job.student} on {job.data}, {job.steps} steps of {job.batch} on {machine(device)}",
        ("", "images/s", "ratio", "s to the first step", "s in all"),
        rows,
    )
    console.print(f"medians of {rounds} runs in alternation; images/s after the first fifth of the steps", style="dim")
    if report is not None:
        facts = {"job": asdict(job), "machine": machine(device), "runs": found, "limits": limits}
        report.write_text(json.dumps(facts, indent=1))


def _plain(job: Job) -> list[str]:
    options = {"data": job.data, "root": job.root, "teacher": job.teacher, "student": job.student}
    sizes = {"batch": str(job.batch), "steps": str(job.steps)}
    return [sys.executable, "-m", "rld_lightning.bench.plain", *(f"--{k}={v}" for k, v in {**options, **sizes}.items())]


def _ours(job: Job, teacher: Path, place: Path) -> list[str]:
    root = [f"data.root={job.root}"] if job.data == "cifar100" else []
    return [
        sys.executable, str(SCRIPT), f"data={job.data}", *root, f"data.batch_size={job.batch}", "model=pair",
        f"model.teacher.name={job.teacher}", f"model.student.name={job.student}", f"model.teacher.weights={teacher}",
        "loss=rld", f"trainer.max_steps={job.steps}", f"hydra.run.dir={place}", f"paths.teachers={teacher.parent}",
    ]  # fmt: skip


def _time(command: Sequence[str], place: Path, plain: bool, job: Job) -> dict[str, float]:
    place.mkdir()
    ended = place / "ended.json"
    stamps = f"+callbacks.step_times={{_target_: rld_lightning.bench.jobs.StepTimes, path: {ended}}}"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    start = time.time()
    result = subprocess.run(
        [*command, f"--ended={ended}" if plain else stamps],
        check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    whole = time.time() - start
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    times = json.loads(ended.read_text())
    first = len(times) // 5
    steady = (len(times) - 1 - first) * job.batch / (times[-1] - times[first])
    return {"images_per_s": steady, "first_step_s": times[0] - start, "whole_s": whole}


def _limits(job: Job, classes: int, shape: tuple[int, int, int]) -> Mapping[str, float]:
    """Images/s if convolutions ran as fast as large square matrix products do here, and nothing else took time."""
    teacher, student = (count_macs(create_model(name, classes), shape) for name in (job.teacher, job.student))
    operations = 2 * (teacher + 3 * student)  # backward computes the gradient of images and of weights
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limits = {}
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        size, best = 2048, float("inf")
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(5):
            start = time.perf_counter()
            float((a @ b)[0, 0])  # which waits
            best = min(best, time.perf_counter() - start)
        limits[name] = 2 * size**3 / best / operations
    return limits
