"""What networks and losses draw while they train (dropout, stochastic depth), the same in a resumed run."""

import hashlib

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class EpochSeed(Callback):
    """Seeds PyTorch's global generators at the start of each epoch, from the seed, the epoch and the process.

    Checkpoints hold no random state, so that a resumed run would otherwise draw other numbers than an uninterrupted
    one. Data have generators of their own.

    Args:
        seed: the run's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seeds them."""
        place = f"{self.seed}/{trainer.current_epoch}/{trainer.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(place.encode(), digest_size=4).digest(), "little"))
