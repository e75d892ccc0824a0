"""Makes random numbers drawn during training (dropout, stochastic depth) the same in a resumed run."""

import hashlib
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seeds PyTorch's global generators before each batch, from the seed, the epoch, the batch and the rank.

    Checkpoints contain no random state; otherwise a resumed run would draw other numbers than an uninterrupted one.
    Data have their own generators.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds the generators."""
        place = f"{self.seed}/{trainer.current_epoch}/{batch_idx}/{trainer.global_rank}"
        seed = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=4).digest(), "little")
        device = trainer.strategy.root_device
        if device.type not in ("cpu", "cuda"):
            torch.manual_seed(seed)
            return
        # Like torch.manual_seed, which also formats a traceback for each unused kind of device.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
