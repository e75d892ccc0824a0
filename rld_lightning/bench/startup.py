"""Benchmark of start-up times: help, a run's first step, and each further trial of a sweep."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from rld_lightning.bench.jobs import SCRIPT, environment
from rld_lightning.console import console, print_table

_FIT = [sys.executable, str(SCRIPT), "data=digits", "model=resnet8", "loss=ce", "recipe=quick"]


def bench_startup(rounds: int) -> None:
    """Runs each in turn and prints wall and CPU seconds, beside those of importing torch and Lightning."""
    times_by_name: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            two, four = (_sweep(place / str(trials), trials) for trials in (2, 4))
            of_round = {
                "import torch, lightning": _time([sys.executable, "-c", "import torch, lightning"]),
                "fit.py --help": _time([sys.executable, str(SCRIPT), "--help"]),
                "fit.py, a run of one step": _time([*_FIT, "trainer.max_steps=1", f"hydra.run.dir={place / 'run'}"]),
                "a sweep of two trials of one step": two,
                "each further trial": ((four[0] - two[0]) / 2, (four[1] - two[1]) / 2),
            }
        for name, taken in of_round.items():
            times_by_name.setdefault(name, []).append(taken)
    rows: list[tuple[str, float, str, float, float]] = []
    for name, times in times_by_name.items():
        walls = [wall for wall, _ in times]
        median, cpu = statistics.median(walls), statistics.median(cpu for _, cpu in times)
        spread = f"{min(walls):.1f} to {max(walls):.1f}"
        rows.append((name, median, spread, cpu, median / (rows[0][1] if rows else median)))
    print_table(
        f"Starting up, digits, resnet8, torch {torch.__version__}",
        ("", "s, median", "of the rounds", "s of CPU", "ratio"),
        rows,
    )
    console.print(f"medians of {rounds} rounds in alternation", style="dim")


def _sweep(folder: Path, trials: int) -> tuple[float, float]:
    seeds = ",".join(map(str, range(trials)))
    return _time([*_FIT[:2], "-m", *_FIT[2:], f"seed={seeds}", "trainer.max_steps=1", f"hydra.sweep.dir={folder}"])


def _time(command: Sequence[str]) -> tuple[float, float]:
    """Returns the wall seconds of a command, and its CPU seconds with the processes that it waits for."""
    with tempfile.TemporaryFile("w+") as log:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-4000:]}")
    return seconds, usage.ru_utime + usage.ru_stime
