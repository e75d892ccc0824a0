"""What decides whether two runs are alike: the settings that have an effect on the result."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rld_lightning.runs.files import CONFIG

# What does not decide what is trained: places, watching, and how the work is shared out.
_NOT_SETTINGS = (
    *("method", "paths", "logger", "callbacks", "print_config", "resume"),
    *(f"data.{key}" for key in ("root", "cache", "cache_gb", "bad_images_file", "num_workers", "eval_batch_size")),
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy", "default_root_dir")),
    *(f"trainer.{key}" for key in ("check_val_every_n_epoch", "log_every_n_steps", "num_sanity_val_steps")),
    "trainer.enable_model_summary",
)
SEEDS = ("seed", "data.seed")
_FILES = ("model.teacher.weights", "model.student.weights")
_NO_FILES = ("None", "auto", "fit", "pretrained", "published")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values by their full keys, as text: ``{"loss.alpha": "1.0", ...}``.

    Args:
        values: a resolved configuration.
        prefix: what to put in front of each key.
    """
    pairs = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        pairs |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": str(value)}
    return pairs


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The settings, seeds included, in which two resolved configurations differ, with both values of each.

    Where things lie, what watches a run and on how many devices it runs do not count; nor do settings that one of the
    two does not have, which another version of this package may have added.
    """
    ours, theirs = settings(first), settings(second)
    return {key: (ours[key], theirs[key]) for key in ours if key in theirs and ours[key] != theirs[key]}


def decides(key: str) -> bool:
    """Whether a key of the configuration decides what is trained, as ``loss.alpha`` does and ``logger`` does not."""
    return not any(f"{key}.".startswith(f"{name}.") for name in _NOT_SETTINGS)


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Everything in a resolved configuration that decides what is trained, as ``{"loss.alpha": "1", ...}``."""
    return {key: canonical(key, value) for key, value in flat(config).items() if decides(key)}


def canonical(key: str, value: str) -> str:
    """The same text for the same value: ``1`` for the ``1.0`` of a file, a whole path for a file of weights."""
    if key in _FILES and value not in _NO_FILES:
        return str(Path(value).absolute())
    return re.sub(r"^(-?\d+)\.0$", r"\1", value)


def refuse_other_settings(run: Path, cfg: DictConfig, *, may_differ: Collection[str] = ()) -> None:
    """Looks whether a folder that has a run is this run's.

    Args:
        run: the folder; one without a run suits any.
        cfg: the run's configuration.
        may_differ: settings that may be others.

    Raises:
        ValueError: a setting is another one.
    """
    if not (run / CONFIG).exists():
        return
    there = OmegaConf.to_container(OmegaConf.load(run / CONFIG))
    here = OmegaConf.to_container(cfg, resolve=True)
    teachers = here["model"]["teacher"], there["model"]["teacher"]
    if all(teachers) and teachers[0]["weights"] in ("auto", "fit", "published"):
        teachers[0]["weights"] = teachers[1]["weights"]  # which file that was
    changed = {key: values for key, values in differences(there, here).items() if key not in may_differ}
    if changed:
        key, (before, now) = next(iter(changed.items()))
        raise ValueError(
            f"{run} holds a run with {key}={before}, and this one has {key}={now}: continue it with the command that "
            "began it, or begin another run in another folder."
        )
