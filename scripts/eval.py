"""Measure any checkpoint or export: `python scripts/eval.py weights=runs/...`."""

import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C ends the other imports, too)

import sys

from omegaconf import DictConfig

from rld_lightning.hydra.data_of_weights import data_of
from rld_lightning.hydra.script import exit_on_user_error, run_task


def main(cfg: DictConfig) -> float:
    """Evaluates the weights and returns the top-1 accuracy in percent."""
    from rld_lightning.tasks.evaluate import evaluate  # imports Lightning: slow, so not for help and mistakes

    return evaluate(cfg).top1


if __name__ == "__main__":
    with exit_on_user_error():
        data = data_of(sys.argv[1:])
    run_task(main, "eval", *data)
