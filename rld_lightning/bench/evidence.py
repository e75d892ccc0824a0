"""Helpers of ``scripts/gpu_check.sh``: facts of the machine, and the collected results."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rld_lightning.bench.steps import machine, matrix_products, shortest
from rld_lightning.models.weights.read import read_weights
from rld_lightning.models.weights.save import save_weights
from rld_lightning.runs.files import LAST, METRICS, STUDENT, SUMMARY, write_csv, write_json
from rld_lightning.runs.metrics_csv import read_rows

_WEIGHTS = ("teacher", "rld-0", "kd-0", "ce-0", "rld-1")  # runs whose weights are collected; 8 files at most in all
_LONGEST_LOG = 200_000  # characters


def facts(state: Path) -> None:
    """Writes and prints the machine's name, versions, and speed of matrix products and copies."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured: dict[str, Any] = {"torch": torch.__version__, "machine": machine(device)}
    if device.type == "cuda":
        measured |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        measured["capability"] = torch.cuda.get_device_capability()
    measured |= {f"{name} matrix TFLOP/s": speed / 1e12 for name, speed in matrix_products(device).items()}
    values = torch.empty(2**26, device=device)
    measured["copy GB/s"] = 2 * values.nbytes / shortest(values.clone, device) / 1e9
    write_json(state / "facts.json", measured)
    print(json.dumps(measured, indent=1))


def gather(state: Path, out: Path) -> None:
    """Collects the results so far into at most 8 files: ``log.txt``, ``results.json``, ``metrics.csv`` and weights."""
    runs = {path.name: path for path in sorted((state / "runs").iterdir()) if path.is_dir()}
    logs = {path.stem: _text(path) for path in [state / "log.txt", *sorted((state / "logs").glob("*.txt"))]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("\n".join(f"==== {name}\n{text[-_LONGEST_LOG:]}" for name, text in logs.items()))
    stages = [line.split() for line in _text(state / "stages.txt").splitlines()]
    results = {
        "facts": _json(state / "facts.json"),
        "stages": [{"name": name, "status": int(rc), "seconds": int(took)} for name, rc, took in stages],
        "bench": {path.stem: _json(path) for path in sorted(state.glob("bench-*.json"))},
        "runs": {name: _summary(path) or {"unfinished": (path / LAST).exists()} for name, path in runs.items()},
    }
    write_json(out / "results.json", results)
    rows = [{"run": name, **row} for name, path in runs.items() if (path / METRICS).exists() for row in read_rows(path)]
    if rows:
        columns = dict.fromkeys(key for row in rows for key in row)
        write_csv(out / METRICS, {key: [row.get(key, "") for row in rows] for key in columns})
    for name in _WEIGHTS:
        source, target = state / "runs" / name / STUDENT, out / f"{name}.safetensors"
        if source.exists() and not target.exists():
            _save_half(source, target)


def _save_half(source: Path, target: Path) -> None:
    weights = read_weights(source)
    state = {key: value.half() if value.is_floating_point() else value for key, value in weights.state_dict.items()}
    save_weights(state, target, weights.metadata)


def _summary(run: Path) -> Mapping[str, Any]:
    return _json(run / SUMMARY)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "facts":
        facts(Path(where))
    else:
        gather(Path(where), Path(rest[0]))
