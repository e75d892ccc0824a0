"""Sweeps started as from the command line, without running their trials."""

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from helpers.configs import CONF
from rld_lightning.tasks.sweep.callback import Sweep


def begin_sweep(*command: str) -> tuple[DictConfig, Sweep]:
    """Starts a sweep with the options of ``scripts/fit.py -m``; returns its config and its callback."""
    GlobalHydra.instance().clear()
    parsed = OverridesParser.create().parse_overrides(list(command))
    fixed = [override.input_line for override in parsed if not override.is_sweep_override()]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("fit", fixed, return_hydra_config=True)
        OmegaConf.set_readonly(config.hydra, False)
        config.hydra.job.config_name = "fit"
        config.hydra.overrides.task = [option for option in command if not option.startswith("hydra")]
        callback = instantiate(config.hydra.callbacks.sweep, warm=False)
        callback.on_multirun_start(config, config_name="fit")
    return config, callback
