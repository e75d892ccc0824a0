"""Sweeps started as from the command line, without running their trials."""

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from helpers.configs import CONF
from rld_lightning.data import CIFAR100DataModule
from rld_lightning.tasks.sweep.callback import Sweep


def begin_sweep(*command: str) -> tuple[DictConfig, Sweep]:
    """Starts a sweep with the options of ``scripts/fit.py -m``; returns its config and its callback.

    CIFAR-100 is downloaded only from ``data.url``.
    """
    GlobalHydra.instance().clear()
    parsed = OverridesParser.create().parse_overrides(list(command))
    fixed = [override.input_line for override in parsed if not override.is_sweep_override()]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"), pytest.MonkeyPatch.context() as patch:
        if not any(option.startswith("data.url=") for option in command):
            patch.setattr(CIFAR100DataModule, "prepare_data", lambda self: None)
        config = hydra.compose("fit", fixed, return_hydra_config=True)
        OmegaConf.set_readonly(config.hydra, False)
        config.hydra.job.config_name = "fit"
        config.hydra.overrides.task = [option for option in command if not option.startswith("hydra")]
        callback = instantiate(config.hydra.callbacks.sweep, warm=False)
        callback.on_multirun_start(config, config_name="fit")
    return config, callback
