"""A small demonstration: teacher, student alone, distilled student. Takes fit.py's options: `loss=dkd seed=1`."""

import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C ends the other imports, too)

from omegaconf import DictConfig

from rld_lightning.hydra.script import run_task


def main(cfg: DictConfig) -> float:
    """Runs the trial and returns the distilled student's top-1 accuracy in percent."""
    from rld_lightning.tasks.trial import run_trial  # imports Lightning: slow, so not for help

    return run_trial(cfg).top1


if __name__ == "__main__":
    run_task(main, "fit", "experiment=quickstart", "sweep=quickstart")
