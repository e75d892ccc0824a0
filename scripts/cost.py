"""Measure the cost of teacher and student on this machine: `python scripts/cost.py run=runs/...`."""

# Not called profile.py: the folder of a script comes first where Python looks for modules, and cProfile, which PyTorch
# imports, would find that in place of the standard library's.
import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C ends the other imports, too)

from omegaconf import DictConfig

from rld_lightning.hydra.script import run_task


def main(cfg: DictConfig) -> None:
    """Measures, and prints tables."""
    from rld_lightning.tasks.cost import cost  # takes seconds that help and mistakes need not wait for

    cost(cfg)


if __name__ == "__main__":
    run_task(main, "cost")
