"""Train a student: `python scripts/fit.py model=wrn40_2_to_wrn16_2 loss=rld`. All options: `--help`, `--cfg job`."""

import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C ends the other imports, too)

from omegaconf import DictConfig

from rld_lightning.hydra.script import is_trial, run_task


def main(cfg: DictConfig) -> float:
    """Trains the student and returns its top-1 accuracy in percent."""
    from rld_lightning.tasks.fit import fit  # imports Lightning: slow, so not for help and mistakes
    from rld_lightning.tasks.trial import run_trial

    return (run_trial if is_trial() else fit)(cfg).top1


if __name__ == "__main__":
    run_task(main, "fit")
