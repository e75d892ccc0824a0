"""Where metrics go beside ``metrics.csv``. Nothing of W&B is imported before a run uses it."""

from rld_lightning.loggers.wandb import WandbLogger, wandb_facts, wandb_run

__all__ = ["WandbLogger", "wandb_facts", "wandb_run"]
