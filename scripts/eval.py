"""Measure any checkpoint or export: `python scripts/eval.py weights=runs/.../student.safetensors data=cifar100`."""

from rld_lightning.hydra.script import run_task
from rld_lightning.tasks.evaluate import evaluate

if __name__ == "__main__":
    run_task(lambda cfg: evaluate(cfg).top1, "eval")
