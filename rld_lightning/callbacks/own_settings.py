"""What a checkpoint says about its run, wherever it is moved to."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from rld_lightning.redact import redact
from rld_lightning.runs.checkpoint import Before, tell
from rld_lightning.runs.likeness import settings


class OwnSettings(Callback):
    """Puts into each checkpoint the settings that decide what is trained, and the checksum of the teacher's file.

    Args:
        cfg: the run's configuration, with what was found for it.
    """

    def __init__(self, cfg: DictConfig) -> None:
        values: Any = redact(OmegaConf.to_container(cfg, resolve=True))
        teacher = values["model"]["teacher"]
        self.before = Before(settings(values), teacher["sha256"] if teacher else None)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts it there."""
        tell(checkpoint, self.before)
