"""Configs composed as from the command line."""

from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from helpers.composing import cache_composition
from rld_lightning.hydra.compose import expand_combined_loss
from rld_lightning.hydra.options import list_options, register_options

cache_composition()
register_options()
CONF = Path(__file__).parents[2] / "conf"
PAIRS = [path.stem for path in sorted((CONF / "model").glob("*_to_*.yaml"))]
IMAGENET_PAIRS = ["resnet34_to_resnet18", "resnet50_to_mobilenetv1"]
TEMPLATES = {"pair", "imagenet_pair", "single"}
SINGLES = sorted(set(list_options("model")) - set(PAIRS) - TEMPLATES)
LOSSES = sorted(set(list_options("loss")) - {"combined"})
# Overrides that replace values which only a Hydra run has.
WITHOUT_HYDRA = {"fit": ["method=test"]}
MOBILE = {"mobilenetv2", "shufflev1", "shufflev2"}


def compose(*overrides, name="fit", resolve=True):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose(name, expand_combined_loss([*WITHOUT_HYDRA.get(name, ()), "paths.run=/run", *overrides]))
    if resolve:
        OmegaConf.resolve(cfg)
    return cfg
