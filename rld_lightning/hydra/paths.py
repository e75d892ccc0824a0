"""Paths of a configuration where a job does not stay in the folder that the command was given in."""

from copy import deepcopy
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from rld_lightning.hydra.quoting import PATHS

_WORDS = ("auto", "fit", "published", "pretrained")  # of weights that are looked for


def anchored(cfg: DictConfig, folder: Path) -> DictConfig:
    """A configuration whose relative paths mean what they do in a folder, wherever the process is."""
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
