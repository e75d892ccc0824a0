"""The main job in miniature: teacher, student alone, student distilled. Takes fit.py's options: `loss=dkd seed=1`."""

from rld_lightning.hydra.script import run_task
from rld_lightning.tasks.quickstart import NO_SWEEP, quickstart

if __name__ == "__main__":
    run_task(quickstart, "fit", "experiment=quickstart", NO_SWEEP)
