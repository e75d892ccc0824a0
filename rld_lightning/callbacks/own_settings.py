"""Stores a run's settings in its checkpoints, which may be moved."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from rld_lightning.redact import redact
from rld_lightning.runs.checkpoint import RunRecord, add_record
from rld_lightning.runs.settings import settings


class OwnSettings(Callback):
    """Adds to each checkpoint the settings that decide what is trained, and the teacher file's checksum.

    Args:
        cfg: the run's configuration, including values determined at run time.
    """

    def __init__(self, cfg: DictConfig) -> None:
        values: Any = redact(OmegaConf.to_container(cfg, resolve=True))
        teacher = values["model"]["teacher"]
        self.before = RunRecord(settings(values), teacher["sha256"] if teacher else None)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the settings."""
        add_record(checkpoint, self.before)
