"""The main job in miniature: teacher, student alone, student distilled. Takes fit.py's options: `loss=dkd seed=1`."""

from rld_lightning.hydra.script import run_task
from rld_lightning.tasks.trial import run_trial

if __name__ == "__main__":
    run_task(lambda cfg: run_trial(cfg).top1, "fit", "experiment=quickstart", "sweep=quickstart")
