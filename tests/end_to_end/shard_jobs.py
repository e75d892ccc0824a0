"""The callback with which test_train_from_shards.py records its processes' batches."""

from pathlib import Path

import torch
from lightning.pytorch import Callback


class Witness(Callback):
    """Records the batches that a process trains and validates on."""

    def __init__(self):
        self.trained, self.validated = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.trained.append((batch.images, batch.label, batch.index))

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.validated.append(batch.index)

    def on_fit_end(self, trainer, module):
        seen = {"trained": self.trained, "validated": torch.cat(self.validated)}
        torch.save(seen, Path(trainer.default_root_dir) / f"rank_{trainer.global_rank}.pt")
