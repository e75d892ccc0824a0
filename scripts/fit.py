"""Train a student: `python scripts/fit.py model=wrn40_2_to_wrn16_2 loss=rld`. All options: `--help`, `--cfg job`."""

from rld_lightning.hydra.script import run_task
from rld_lightning.tasks.fit import fit
from rld_lightning.tasks.launch import is_trial
from rld_lightning.tasks.trial import run_trial

if __name__ == "__main__":
    run_task(lambda cfg: (run_trial if is_trial() else fit)(cfg).top1, "fit")
