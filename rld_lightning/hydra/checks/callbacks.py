"""Checks for callbacks that cannot work in a run of this package, before anything slow is imported."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import yaml
from omegaconf import DictConfig

from rld_lightning.errors import UserError, did_you_mean
from rld_lightning.hydra.options import CONF

# Logged for every loss and all callbacks; other names below train/ and stats/ depend on the loss.
LOGGED = ("val/top1", "val/ce", "val/top5", "val/top1_best", "train/loss", "train/top1", "train/top5")
_OTHERS = r"(train|stats)/.+|val/(teacher_top1|agreement|top1_teacher_wrong)|images/s|loss"
_FINDERS = {"LearningRateFinder": "recipe.optimizer.lr", "BatchSizeFinder": "recipe.batch_size"}


def check_watchers(cfg: DictConfig) -> None:
    """Checks that callbacks monitor metrics that are logged, and that none changes attributes that the module lacks.

    Raises:
        UserError: one sentence per mistake.
    """
    callbacks: Mapping[str, Any] = cfg.get("callbacks") or {}
    nodes = {name: node for name, node in callbacks.items() if isinstance(node, Mapping)}
    faults = [fault for name, node in nodes.items() for fault in _faults(f"callbacks.{name}", node)]
    if "recipe" in cfg and nodes and not callbacks.keys() & _default():
        faults.append(
            "callbacks has none of callbacks=default, which measure, save and show a run; add it, as in "
            "callbacks=[default,ema], and switch single ones off with callbacks.<name>=null."
        )
    if faults:
        raise UserError("\n".join(faults))


@cache
def _default() -> frozenset[str]:
    return frozenset(yaml.safe_load((CONF / "callbacks/default.yaml").read_text()))


def _faults(key: str, node: Mapping[str, Any]) -> Iterator[str]:
    kind = str(node.get("_target_", "")).rpartition(".")[2]
    if option := _FINDERS.get(kind):
        yield (
            f"{key}: {kind} changes an attribute of the module while it tries values, but {option} is part of the "
            f"configuration, on which schedules and run directories rely; sweep over values instead: -m {option}=..."
        )
    monitor = node.get("monitor")
    if isinstance(monitor, str) and monitor not in LOGGED and not re.fullmatch(_OTHERS, monitor):
        meant = did_you_mean(monitor, LOGGED)
        yield f"{key}.monitor={monitor} is not logged; choose one of {', '.join(LOGGED)}.{meant}"
