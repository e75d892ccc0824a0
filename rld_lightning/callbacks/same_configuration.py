"""Checks that all processes of a run have the same configuration."""

import hashlib
import json
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from rld_lightning.errors import UserError
from rld_lightning.runs.settings import flat

# Keys that may differ between machines, or concern rank 0 only.
_LOCAL = ("logger", "print_config")


class SameConfiguration(Callback):
    """Compares a hash of the resolved configuration over the ranks when fitting starts, and stops all on a mismatch.

    Ranks with different hyper-parameters would train to the end, averaging gradients of different losses. Loggers, and
    the paths of data, teachers and runs, may differ between nodes; the run's own directory may not.

    Args:
        cfg: this process's configuration, before the run adds anything.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.values = flat(_shared(cfg))
        self.digest = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compares the hashes with one small collective, and a second one only on a mismatch.

        Raises:
            UserError: on all ranks; names the values that differ.
        """
        if stage != "fit" or trainer.world_size == 1:
            return
        if len(set(_gather(self.digest))) == 1:
            return
        first, *others = _gather(self.values)
        for rank, values in enumerate(others, 1):
            if keys := sorted(key for key in first | values if first.get(key) != values.get(key)):
                found = ", ".join(f"{key}={values.get(key)} where process 0 has {first.get(key)}" for key in keys[:3])
                raise UserError(
                    f"the processes of this run have different configurations: process {rank} has {found}"
                    f"{' ...' if len(keys) > 3 else ''}. Start all of them with the same command."
                )


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _shared(cfg: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(cfg, resolve=False)
    values["run"] = str(cfg.paths.run)
    values["paths"] = {name: f"<{name}>" for name in cfg.paths}  # and thereby all paths below it
    for name in _LOCAL:
        values.pop(name, None)
    shared: Any = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    return shared
