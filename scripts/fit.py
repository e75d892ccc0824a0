"""Train a student: `python scripts/fit.py model=wrn40_2_to_wrn16_2 loss=rld`. All options: `--help`, `--cfg job`."""

from rld_lightning.cli import run_task
from rld_lightning.tasks.fit import fit

if __name__ == "__main__":
    run_task(lambda cfg: fit(cfg).top1, "fit")
