"""What runs are called after what they train."""

from collections.abc import Mapping
from typing import Any


def class_name(target: str) -> str:
    """``SGD`` of ``torch.optim.SGD``."""
    return target.rsplit(".", 1)[-1]


def loss_choice(choice: str, loss: Mapping[str, Any]) -> str:
    """The option of the loss group, for folders: ``rld``, or ``rld+at`` of a combination.

    Args:
        choice: ``hydra.runtime.choices.loss``.
        loss: the loss's part of the configuration.
    """
    return loss_name(loss) if _is_combined(loss) else choice


def loss_name(loss: Mapping[str, Any]) -> str:
    """What a run is called after its loss: ``RLD``, or ``rld+at`` of a combination.

    Args:
        loss: the loss's part of the configuration.
    """
    if _is_combined(loss):
        return "+".join(name for name, part in loss.items() if isinstance(part, Mapping) and "_target_" in part)
    return class_name(loss["_target_"]).removesuffix("Loss")


def _is_combined(loss: Mapping[str, Any]) -> bool:
    return class_name(loss["_target_"]) == "CombinedLoss"
