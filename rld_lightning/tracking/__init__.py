"""Weights & Biases. wandb is not imported before a run uses it."""

from rld_lightning.tracking.examples import WandbExamples
from rld_lightning.tracking.logger import WandbLogger, tracked, wandb_facts

__all__ = ["WandbExamples", "WandbLogger", "tracked", "wandb_facts"]
