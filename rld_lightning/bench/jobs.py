"""Benchmark of whole jobs from their command: ``scripts/fit.py`` with callbacks and loggers, against a plain trainer.

All contenders are started, but only one at a time is running while the others are stopped: each runs for some seconds,
in turn. So start-up is paid once, and a machine that is slow for a while affects all alike.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rld_lightning.bench.steps import machine, matrix_products
from rld_lightning.console import console, print_table
from rld_lightning.models.complexity import count_macs
from rld_lightning.models.factory import create_model
from rld_lightning.models.weights.save import save_weights
from rld_lightning.package_files import package_folder

SCRIPT = package_folder("scripts") / "fit.py"
DATA = ("cifar100", "digits", "imagefolder")
PLAIN = "plain trainer"


class StepTimes(Callback):
    """Appends the end of each training step to a file, in seconds since the Unix epoch."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the file: for each step anew, that would take a twentieth of a fast one."""
        self.file = self.path.open("a", buffering=1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Records the time."""
        write_time(self.file)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the file."""
        self.file.close()


def write_time(file: TextIO) -> None:
    """Appends the current time to a file that writes each line at once."""
    file.write(f"{time.time()}\n")


@dataclass(frozen=True)
class Job:
    """A training job with RLD, the pair's own recipe and random weights of the teacher."""

    data: str  # one of `DATA`
    root: str  # folder of CIFAR-100, or of `train/<class>/` and `val/<class>/` with images
    teacher: str  # name of its network
    student: str  # name of its network
    batch: int  # images per step
    workers: int = 2  # loader processes of the plain trainer

    @property
    def classes(self) -> int:
        """Number of classes."""
        if self.data == "imagefolder":
            return len(list(Path(self.root, "train").iterdir()))
        return {"cifar100": 100, "digits": 10}[self.data]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image as the networks get it."""
        side = {"cifar100": 32, "digits": 8, "imagefolder": 224}[self.data]
        return 3, side, side


@dataclass
class Contender:
    """A training process, stopped while others are measured."""

    command: Sequence[str]
    folder: Path  # for its log and the times of its steps
    first_step: float = 0.0  # seconds from its start to the end of its first step
    rates: list[float] = field(default_factory=list)  # images/s of each measurement

    @property
    def times(self) -> Path:
        """File with the end times of steps."""
        return self.folder / "times"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Starts it, waits for three steps and stops it; on exit kills it and the processes that it started."""
        start = time.time()
        with (self.folder / "log").open("w") as log:
            process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment(), start_new_session=True)
        self.process = process
        try:
            self._wait(steps=3, seconds=0)
            self.first_step = self._end_times()[0] - start
            self._signal(signal.SIGSTOP)
            yield
        finally:
            if process.poll() is None:
                self._signal(signal.SIGKILL)
            process.wait()

    def measure(self, seconds: float, batch: int, steps: int = 3) -> None:
        """Lets it run for some seconds and at least some steps; the first step only starts the clock."""
        before = len(self._end_times())
        self._signal(signal.SIGCONT)
        self._wait(before + steps, seconds)
        self._signal(signal.SIGSTOP)
        times = self._end_times()[before:]
        self.rates.append((len(times) - 1) * batch / (times[-1] - times[0]))

    def _wait(self, steps: int, seconds: float) -> None:
        stop = time.monotonic() + seconds
        while time.monotonic() < stop or len(self._end_times()) < steps:
            if self.process.poll() is not None:
                log = (self.folder / "log").read_text()
                raise RuntimeError(f"{' '.join(self.command)} has ended:\n{log[-4000:]}")
            time.sleep(0.02)

    def _end_times(self) -> list[float]:
        return [float(line) for line in self.times.read_text().split()] if self.times.exists() else []

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)


def bench_fit(
    job: Job, rounds: int, seconds: float, switches: Sequence[str], folder: Path | None, report: Path | None
) -> None:
    """Measures all contenders in turn, and prints their medians and the limit of this machine.

    Args:
        switches: the overrides of each contender of ours, such as ``"model.teacher.cache=false"``; if empty, there is
            one contender without overrides.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contenders are ended too
    overrides = {f"fit.py {switch}".strip(): switch for switch in switches or [""]}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        teacher = store_teacher(job, folder or place)
        contenders = {PLAIN: Contender(_plain(job, place / "0"), place / "0")}
        for number, (title, switch) in enumerate(overrides.items(), 1):
            own = place / str(number)
            contenders[title] = Contender([*fit_command(job, teacher, own), *switch.split()], own)
        with ExitStack() as stack:
            for contender in contenders.values():
                contender.folder.mkdir()
                stack.enter_context(contender.running())
            for _ in range(rounds):
                for contender in contenders.values():
                    contender.measure(seconds, job.batch)
    base, limits = contenders[PLAIN], limit(job)
    rows: list[tuple[object, ...]] = [(title, *_row(contender, base)) for title, contender in contenders.items()]
    plain_rate = statistics.median(base.rates)
    rows += [(f"limit: {kind} matrices", rate, f"{rate / plain_rate:.2f}", None) for kind, rate in limits.items()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print_table(
        f"{job.teacher} to {job.student} on {job.data}, batch {job.batch}, on {machine(device)}",
        ("", "images/s", "ratio (of the rounds)", "s to the first step"),
        rows,
    )
    console.print(f"medians of {rounds} rounds in alternation, of {seconds:g} s each", style="dim")
    if report is not None:
        runs = {title: {"first_step_s": c.first_step, "images_per_s": c.rates} for title, c in contenders.items()}
        facts = {"job": asdict(job), "machine": machine(device), "runs": runs, "limits": limits}
        report.write_text(json.dumps(facts, indent=1))


def prepare_fit(job: Job, steps: int, switches: Sequence[str], folder: Path) -> None:
    """Warm-up: runs our contenders for some steps, so that code is compiled and the teacher's logits are cached."""
    teacher = store_teacher(job, folder)
    for switch in switches or [""]:
        with tempfile.TemporaryDirectory() as name:
            own = Path(name)
            contender = Contender([*fit_command(job, teacher, own), *switch.split()], own)
            with contender.running():
                contender.measure(0, job.batch, steps)


def store_teacher(job: Job, folder: Path) -> Path:
    """Writes a teacher with fixed random weights into a folder, unless it is there."""
    path = folder / f"{job.teacher.replace('/', '_')}_{job.data}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        folder.mkdir(parents=True, exist_ok=True)
        teacher = create_model(job.teacher, job.classes)
        save_weights(teacher, path, {"name": job.teacher, "num_classes": job.classes})
    return path


def fit_command(job: Job, teacher: Path, folder: Path) -> list[str]:
    """Returns the command of our contender, which writes the times of its steps into a folder."""
    root = [] if job.data == "digits" else [f"data.root={job.root}"]
    return [
        sys.executable, str(SCRIPT), f"data={job.data}", *root, f"data.batch_size={job.batch}", "model=pair",
        f"model.teacher.name={job.teacher}", f"model.student.name={job.student}", f"model.teacher.weights={teacher}",
        "loss=rld", f"hydra.run.dir={folder / 'run'}", f"paths.teachers={teacher.parent}",
        f"+callbacks.step_times={{_target_: rld_lightning.bench.jobs.StepTimes, path: {folder / 'times'}}}",
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """Returns the environment for processes that import this package even if it is not installed."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    }


def run_fit(overrides: Sequence[str]) -> None:
    """Runs ``fit.py`` to its end, without output.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    command = [sys.executable, str(SCRIPT), *overrides]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment())
    if result.returncode:
        raise RuntimeError(f"fit.py failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")


def _plain(job: Job, folder: Path) -> list[str]:
    options = {**asdict(job), "times": folder / "times"}
    return [sys.executable, "-m", "rld_lightning.bench.plain", *(f"--{key}={value}" for key, value in options.items())]


def _row(contender: Contender, base: Contender) -> tuple[float, str, float]:
    ratios = [ours / plain for ours, plain in zip(contender.rates, base.rates, strict=True)]
    spread = "" if contender is base else f" ({min(ratios):.2f} to {max(ratios):.2f})"
    return statistics.median(contender.rates), f"{statistics.median(ratios):.2f}{spread}", contender.first_step


def limit(job: Job) -> Mapping[str, float]:
    """Returns the images/s if convolutions were as fast as large square matrix products, and nothing else took time."""
    teacher, student = (count_macs(create_model(name, job.classes), job.shape) for name in (job.teacher, job.student))
    operations = 2 * (teacher + 3 * student)  # backward computes gradients of inputs and weights
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: speed / operations for name, speed in matrix_products(device).items()}
