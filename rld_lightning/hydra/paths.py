"""Resolves the relative paths of a config, for jobs that change their working directory."""

from copy import deepcopy
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from rld_lightning.hydra.quoting import PATHS

_WORDS = ("auto", "fit", "published", "pretrained")  # values of ``weights`` that are not paths


def with_absolute_paths(cfg: DictConfig, folder: Path) -> DictConfig:
    """Returns a copy of a config, with its relative paths resolved in a folder."""
    other = deepcopy(cfg)
    for key in PATHS:
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(other, group) if group else other
        if not isinstance(node, DictConfig) or name not in node or OmegaConf.is_interpolation(node, name):
            continue
        value = node[name]
        if isinstance(value, str) and value not in _WORDS and "://" not in value and not value.startswith("~"):
            OmegaConf.update(other, key, str(folder / value))
    return other
