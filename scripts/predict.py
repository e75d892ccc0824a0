"""Classify images: `python scripts/predict.py weights=runs/... images=/photos`."""

import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C ends the other imports, too)

import sys

from omegaconf import DictConfig

from rld_lightning.console import console
from rld_lightning.hydra.script import run_task

UNREADABLE = 3  # exit code if some images could not be read


def main(cfg: DictConfig) -> None:
    """Prints and writes the most probable classes of each image."""
    from rld_lightning.tasks.predict import predict  # slow, so not for help and mistakes

    if predict(cfg):
        sys.exit(UNREADABLE)


if __name__ == "__main__":
    if "out=-" in sys.argv[1:]:
        console.stderr = True  # standard output contains only the results
    run_task(main, "predict")
