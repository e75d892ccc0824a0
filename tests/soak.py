"""Interrupts runs in all ways that machines do, and counts how many resume to the same result: ``make soak``.

Each run is a process forked from one that has imported everything, so that a hundred kills take minutes. A run is
interrupted at a step, when it opens, renames or removes a file of its folder, or from outside; then the same command
resumes it with ``resume=<folder>``. It has to end with the weights, metrics and files of an uninterrupted run.
"""

import argparse
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Teacher and student, so that the teacher's training is interrupted, too; with checkpoints within epochs.
JOB = (
    "data=digits", "model=pair", "model.teacher.name=resnet8", "model.student.name=resnet8", "loss=rld",
    "model.teacher.weights=fit", "recipe=quick", "recipe.epochs=2", "data.batch_size=128", "trainer.precision=32-true",
    "callbacks.progress=null", "print_config=false", "callbacks.checkpoint_last.steps=5",
)  # fmt: skip
ONE = ("trainer=cpu",)
TWO = ("trainer=ddp_cpu",)
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.truncate", "os.link", "os.symlink", "shutil.move"}
# Values that differ between runs.
CLOCKS = re.compile(r"images_per_s|seconds|time|memory")


# In the process of a run


def run(overrides: Sequence[str], log: Path, broken: Callable[[], None] | None = None) -> None:
    """Runs a job as ``scripts/fit.py`` does, with its output in a file."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background jobs
    if broken is not None:
        broken()
    from rld_lightning.hydra.script import run_task
    from rld_lightning.tasks.fit import fit

    sys.argv = ["fit.py", *overrides]
    run_task(lambda cfg: fit(cfg).top1, "fit")


def kill_self() -> None:
    """Kills this process, as in a power failure."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class AtStep:
    """Interrupts a process at a training step, counted over teacher and student.

    Attributes:
        step: from 0.
        signals: signals that the process sends to itself.
    """

    step: int
    signals: tuple[int, ...] = (signal.SIGKILL,)

    def __call__(self) -> None:
        """Patches the training step."""
        from rld_lightning.module import DistillationModule

        count, original = iter(range(sys.maxsize)), DistillationModule.training_step

        def training_step(*arguments: Any, **options: Any) -> Any:
            if next(count) == self.step:
                for number in self.signals:
                    os.kill(os.getpid(), number)
            return original(*arguments, **options)

        DistillationModule.training_step = training_step


@dataclass(frozen=True)
class AtWrite:
    """Kills a process before it opens a file below a folder for writing, renames or removes it.

    Attributes:
        folder: the folder.
        moment: the number of the write, from 0; never if there are fewer writes.
        count: a file that gets one byte per write.
    """

    folder: Path
    moment: int
    count: Path | None = None

    def __call__(self) -> None:
        """Installs an audit hook."""
        moments, folder = iter(range(sys.maxsize)), str(self.folder)
        file = os.open(self.count, os.O_CREAT | os.O_WRONLY | os.O_APPEND) if self.count else None

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in WRITES and not (event == "open" and _writes(arguments)):
                return
            if any(str(argument).startswith(folder) for argument in arguments[:2]):
                if file is not None:
                    os.write(file, b".")
                if next(moments) == self.moment:
                    kill_self()

        sys.addaudithook(hook)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return not mode.startswith("r") or "+" in mode
    return bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


# In the main process


@dataclass
class Promise:
    """A guarantee, one row of the table.

    Attributes:
        text: the guarantee.
        tried: number of tries.
        broken: descriptions of failures, by the number of the try.
        figure: an additional measurement.
    """

    text: str
    tried: int = 0
    broken: dict[int, str] = field(default_factory=dict)
    figure: str = ""


class Soak:
    """Interrupted runs and the uninterrupted run, below one folder."""

    def __init__(self, folder: Path, job: Sequence[str] = JOB, seed: int = 0) -> None:
        self.folder = folder
        self.job = job
        self.random = random.Random(seed)
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload(["soak_imports"])
        self._made = 0
        self._expected: dict[tuple[str, ...], tuple[Any, int, int]] = {}

    def start(self, folder: Path, overrides: Iterable[str] = ONE, broken: Callable[[], None] | None = None) -> Any:
        """Starts a process that runs the job in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = (f"hydra.run.dir={folder / 'run'}", f"paths.teachers={folder / 'teachers'}")
        process = self.server.Process(target=run, args=((*self.job, *paths, *overrides), folder / "log", broken))
        process.start()
        return process

    def finish(self, folder: Path, overrides: Iterable[str] = ONE, broken: Callable[[], None] | None = None) -> int:
        """Runs the job in a folder and returns the exit code."""
        process = self.start(folder, overrides, broken)
        process.join()
        return int(process.exitcode)

    def new(self) -> Path:
        """Returns a new folder for a run."""
        self._made += 1
        return self.folder / f"{self._made:04d}"

    def expected(self, overrides: tuple[str, ...]) -> tuple[Any, int, int]:
        """Returns the results of an uninterrupted run, and its numbers of writes and steps."""
        if overrides not in self._expected:
            folder = self.new()
            count = self.folder / "count"
            count.unlink(missing_ok=True)
            code = self.finish(folder, overrides, AtWrite(folder, sys.maxsize, count))
            if code:
                raise RuntimeError(f"a run that nobody disturbed ended with {code}: see {folder / 'log'}")
            steps = 2 * 2 * 12  # networks x epochs x batches of 128 of 1,437 images
            self._expected[overrides] = results(folder), count.stat().st_size, steps
        return self._expected[overrides]

    def check_resumed(self, promise: Promise, folder: Path, overrides: tuple[str, ...] = ONE, what: str = "") -> None:
        """Resumes an interrupted run and compares its results with those of an uninterrupted one."""
        promise.tried += 1
        code = self.finish(folder, (*overrides, f"resume={folder / 'run'}"))
        problem = f"exit code {code}" if code else difference(results(folder), self.expected(overrides)[0])
        if not problem and "Traceback" in (folder / "log").read_text():
            problem = "a traceback"
        if problem:
            promise.broken[promise.tried] = f"{what}: {problem}; see {folder / 'log'}"
        else:
            shutil.rmtree(folder)

    # The guarantees

    def kills_at_writes(self, tries: int) -> Promise:
        """Kills runs at writes of files."""
        promise = Promise("Killed while it writes, renames or removes any file: goes on to the same end")
        writes = self.expected(ONE)[1]
        for moment in _spread(self.random, writes, tries):
            folder = self.new()
            self.finish(folder, ONE, AtWrite(folder, moment))
            self.check_resumed(promise, folder, what=f"killed at write {moment} of {writes}")
        promise.figure = f"{writes} moments"
        return promise

    def kills_at_steps(self, tries: int, overrides: tuple[str, ...] = ONE) -> Promise:
        """Kills runs at training steps."""
        processes = "a process of two" if overrides == TWO else "it"
        promise = Promise(f"Killed at any step, {processes} goes on to the same weights, metrics and files")
        steps = self.expected(overrides)[2]
        for step in _spread(self.random, steps, tries):
            folder = self.new()
            if overrides == TWO:
                self.kill_later(folder, overrides, self.random.uniform(3, 25))
            else:
                self.finish(folder, overrides, AtStep(step))
            self.check_resumed(promise, folder, overrides, what=f"killed at step {step} of {steps}")
        return promise

    def kill_later(self, folder: Path, overrides: tuple[str, ...], seconds: float) -> None:
        """Kills a run, or one of its child processes, from outside."""
        process = self.start(folder, overrides)
        process.join(seconds)
        if process.is_alive():
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(self.random.choice([str(process.pid), *children])), signal.SIGKILL)
            process.join(60)
        time.sleep(1)  # for the processes that end the others

    def signals(self, tries: int) -> Promise:
        """Stops runs with signals."""
        promise = Promise("Asked to stop (SIGINT, SIGTERM): exits with 130 or 143, and goes on to the same end")
        codes, slowest = {signal.SIGINT: 130, signal.SIGTERM: 143}, 0.0
        for step in _spread(self.random, self.expected(ONE)[2], tries):
            number, folder = self.random.choice(list(codes)), self.new()
            process = self.start(folder, ONE, AtStep(step, (number,)))
            process.join()
            ended = time.time()
            log = folder / "log"
            slowest = max(slowest, ended - log.stat().st_mtime)
            if process.exitcode != codes[number]:
                promise.broken[promise.tried + 1] = f"{number.name} at step {step}: exit code {process.exitcode}"
            self.check_resumed(promise, folder, what=f"{number.name} at step {step}")
        promise.figure = f"ended {slowest:.1f} s after its last line"
        return promise

    def flips(self, tries: int) -> Promise:
        """Flips bits in checkpoints."""
        promise = Promise("A flipped bit in last.ckpt is seen, and the run goes on from the checkpoint before")
        steps = self.expected(ONE)[2]
        folder = self.new()
        self.finish(folder, ONE, AtStep(steps - 3))
        for _ in range(tries):
            copy = self.new()
            shutil.copytree(folder, copy)
            _flip(copy / "run" / "last.ckpt", self.random)
            self.check_resumed(promise, copy, what="a flipped bit")
        return promise

    def full_disk(self, tries: int) -> Promise:
        """Fills the disk: a file system in memory with a few MB."""
        promise = Promise("A disk that is full ends it in one sentence; with room again, it goes on to the same end")
        for _ in range(tries):
            folder = self.new()
            folder.mkdir(parents=True)
            size = self.random.randrange(700, 3000)
            if _mount(folder, f"size={size}k") != 0:
                promise.figure = "not tried: mounting is not allowed here"
                return promise
            try:
                code = self.finish(folder)
                if code not in (0, 2):
                    promise.broken[promise.tried + 1] = f"{size} KiB: exit code {code}"
                _mount(folder, "remount,size=100m")
                kept = self.new()
                shutil.copytree(folder, kept)
            finally:
                subprocess.run(["umount", folder], check=False)
            for path in (kept / "run").rglob("*.yaml"):  # they contain the folder's path
                path.write_text(path.read_text().replace(str(folder), str(kept)))
            self.check_resumed(promise, kept, what=f"{size} KiB")
        return promise

    def long(self, epochs: int) -> Promise:
        """Trains for many epochs and measures memory, open files and threads."""
        promise = Promise("Memory, files and threads do not grow with the epochs")
        folder = self.new()
        process = self.start(folder, (*ONE, f"recipe.epochs={epochs}", "model.teacher.weights=fit"))
        seen, run = [], folder / "run"
        while process.is_alive():
            # Only during epochs: the start, the teacher and the figures at the end open other files.
            if (run / "metrics.csv").exists() and not (run / "summary.json").exists():
                try:
                    seen.append(_resources(process.pid))
                except (OSError, IndexError, ValueError):
                    break
            process.join(0.2)
        process.join()
        promise.tried = 1
        half, last = seen[len(seen) // 2], seen[-2]
        promise.figure = f"{epochs} epochs: {half[0]} -> {last[0]} MiB, {half[1]} -> {last[1]} files"
        if process.exitcode or last[0] > 1.1 * half[0] + 20 or last[1] > half[1] + 2 or last[2] > half[2] + 2:
            promise.broken[1] = f"exit code {process.exitcode}, {promise.figure}, threads {half[2]} -> {last[2]}"
        return promise


def results(folder: Path) -> dict[str, Any]:
    """The results of a run, without values that differ between runs: weights, metrics, names of files."""
    import csv
    import json

    from safetensors.torch import load_file

    found = folder / "run"
    with (found / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and not CLOCKS.search(k)} for row in csv.DictReader(file)]
    summary = json.loads((found / "summary.json").read_text())
    return {
        "weights": {
            name: tensor.numpy().tobytes() for name, tensor in load_file(found / "student.safetensors").items()
        },
        "metrics": rows,
        "summary": {k: v for k, v in summary.items() if isinstance(v, int | float) and not CLOCKS.search(k)},
        "speed": summary.get("images_per_s") is not None,
        "files": sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()),
    }


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Describes the first difference in a few words; an empty string if there is none."""
    for key, value in expected.items():
        if found[key] == value:
            continue
        if key == "weights":
            return "other weights"
        if key == "files":
            return f"other files: {sorted(set(found[key]) ^ set(value))}"
        if key == "metrics" and len(found[key]) != len(value):
            return f"{len(found[key])} rows of metrics, not {len(value)}"
        return f"other {key}"
    return ""


def _spread(chance: random.Random, total: int, tries: int) -> list[int]:
    """Draws different moments, sorted; all of them if there are not enough."""
    return sorted(chance.sample(range(total), tries) if tries <= total else range(total))


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _mount(folder: Path, options: str) -> int:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode if shutil.which("mount") else 1


def _resources(process: int) -> tuple[int, int, int]:
    """Resident memory in MiB, open files and threads."""
    status = Path(f"/proc/{process}/status").read_text()
    memory, threads = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads"))
    return memory // 1024, len(list(Path(f"/proc/{process}/fd").iterdir())), threads


def main() -> None:
    """Interrupts runs and prints the table of guarantees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, number in {"writes": 60, "kills": 40, "pairs": 8, "signals": 20, "flips": 20, "disks": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=number, help=f"how many ({number})")
    parser.add_argument("--epochs", type=int, default=300, help="of the long run; 0 skips it (300)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(folder, seed=options.seed)
    jobs = [
        (options.writes, soak.kills_at_writes),
        (options.kills, soak.kills_at_steps),
        (options.signals, soak.signals),
        (options.flips, soak.flips),
        (options.disks, soak.full_disk),
        (options.pairs, lambda tries: soak.kills_at_steps(tries, TWO)),
        (options.epochs, soak.long),
    ]
    broken = 0
    for tries, job in jobs:
        if tries:
            start = time.monotonic()
            promise = job(tries)
            held = promise.tried - len(promise.broken)
            print(
                f"{held:4d} of {promise.tried:<4d} {time.monotonic() - start:6.0f} s  {promise.text}  {promise.figure}"
            )
            for what in promise.broken.values():
                print(f"       {what}")
            sys.stdout.flush()
            broken += len(promise.broken)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
