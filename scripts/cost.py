"""Measure the cost of teacher and student on this machine: `python scripts/cost.py run=runs/...`."""

# Not named profile.py: a script's folder is first in Python's module search path, so cProfile, which PyTorch imports,
# would import it instead of the standard library's.
import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C ends the other imports, too)

from omegaconf import DictConfig

from rld_lightning.hydra.script import run_task


def main(cfg: DictConfig) -> None:
    """Measures the cost, and prints tables."""
    from rld_lightning.tasks.cost import cost  # slow, so not for help and mistakes

    cost(cfg)


if __name__ == "__main__":
    run_task(main, "cost")
