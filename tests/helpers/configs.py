"""Configurations as a command line gives them."""

from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from helpers.composing import remember
from rld_lightning.hydra.compose import expand_combined_loss
from rld_lightning.hydra.options import list_options, register_options

remember()
register_options()
CONF = Path(__file__).parents[2] / "conf"
PAIRS = [path.stem for path in sorted((CONF / "model").glob("*_to_*.yaml"))]
IMAGENET_PAIRS = ["resnet34_to_resnet18", "resnet50_to_mobilenetv1"]
FRAMES = {"pair", "imagenet_pair", "single"}
SINGLES = sorted(set(list_options("model")) - set(PAIRS) - FRAMES)
LOSSES = sorted(set(list_options("loss")) - {"combined"})
# What is known only under Hydra.
HYDRAS = {"fit": ["method=test"]}
MOBILE = {"mobilenetv2", "shufflev1", "shufflev2"}


def compose(*overrides, name="fit", resolve=True):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose(name, expand_combined_loss([*HYDRAS.get(name, ()), "paths.run=/run", *overrides]))
    if resolve:
        OmegaConf.resolve(cfg)
    return cfg
