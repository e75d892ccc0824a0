"""Names of runs, derived from what they train."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def class_name(target: str) -> str:
    """Returns ``SGD`` for ``torch.optim.SGD``."""
    return target.rsplit(".", 1)[-1]


def loss_choice(choice: str, loss: Mapping[str, Any]) -> str:
    """Returns the option of the loss group, for directory names: ``rld``, or ``rld+at`` for a combination."""
    return loss_name(loss) if _is_combined(loss) else choice


def dataset_name(choice: str | None, data: Mapping[str, Any]) -> str:
    """Returns the data set's name, for W&B: ``cifar100``, or ``photos`` for a folder or shards of that name.

    Args:
        choice: ``hydra.runtime.choices.data``; None if unknown.
    """
    if data.get("name"):
        return str(data["name"])
    if choice in ("imagefolder", "shards") and data.get("root"):
        root = str(data["root"]).rstrip("/")
        return root.rsplit("/", 1)[-1] if "://" in root else Path(root).resolve().name
    return choice or class_name(data["_target_"]).removesuffix("DataModule").lower()


def loss_name(loss: Mapping[str, Any]) -> str:
    """Returns the loss's name in a run's name: ``RLD``, or ``rld+at`` for a combination."""
    if _is_combined(loss):
        return "+".join(name for name, part in loss.items() if isinstance(part, Mapping) and "_target_" in part)
    return class_name(loss["_target_"]).removesuffix("Loss")


def _is_combined(loss: Mapping[str, Any]) -> bool:
    return class_name(loss["_target_"]) == "CombinedLoss"
