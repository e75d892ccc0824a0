"""Training speed in images per second over all processes."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rld_lightning.data.base import as_batch
from rld_lightning.models.complexity import clock
from rld_lightning.trainer_callbacks import shown_by_lightning


class Throughput(Callback):
    """Logs ``train/images_per_s``, the epoch's mean, and the mean so far as ``images/s`` for Lightning's progress bars.

    Only training steps are timed, not validation, checkpoints and the start of each epoch.

    Args:
        window: steps between two readings of the clock; on an accelerator each reading synchronises with the device.
    """

    def __init__(self, window: int = 20) -> None:
        self.window = window
        self.seconds, self.images, self.pending = 0.0, 0, 0
        self.since: float | None = None
        self.paused = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the epoch's clock; continues it if a run resumes within the epoch."""
        self.seconds, self.images, self.pending = 0.0, 0, 0
        self.since, self.paused = None, False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restarts the clock after a checkpoint."""
        if self.paused:
            self.since, self.paused = clock(trainer.strategy.root_device), False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads the clock after every ``window`` steps."""
        if self.since is None:  # the first step, also of a resumed run, includes warm-up and loader start
            self.since = clock(trainer.strategy.root_device)
            return
        self.pending += len(as_batch(batch).label) * trainer.world_size
        if (batch_idx + 1) % self.window and batch_idx + 1 < trainer.num_training_batches:
            return
        self._read(trainer)
        if shown_by_lightning(trainer):
            pl_module.log("images/s", self.images / self.seconds, prog_bar=True, logger=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the epoch's mean."""
        if self.seconds:
            pl_module.log("train/images_per_s", self.images / self.seconds)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stops the clock until the next step, and adds the time so far."""
        self._read(trainer)
        self.since, self.paused = None, self.since is not None
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def _read(self, trainer: Trainer) -> None:
        if self.pending and self.since is not None:
            now = clock(trainer.strategy.root_device)
            self.seconds += now - self.since
            self.images += self.pending
            self.since, self.pending = now, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch's counts."""
        return {"seconds": self.seconds, "images": self.images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts."""
        self.seconds, self.images = float(state_dict["seconds"]), int(state_dict["images"])
