"""Weights & Biases. Nothing of wandb is imported before a run uses it."""

from rld_lightning.tracking.examples import WandbExamples
from rld_lightning.tracking.logger import WandbLogger, wandb_facts, wandb_run

__all__ = ["WandbExamples", "WandbLogger", "wandb_facts", "wandb_run"]
