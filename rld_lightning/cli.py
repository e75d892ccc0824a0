"""The frame of every script: Hydra reads ``conf/``, a task runs, user mistakes end in one sentence."""

import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import rld_lightning.config  # noqa: F401  (registers the resolvers that conf/ uses)
from rld_lightning.console import console, quiet_lightning
from rld_lightning.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"


def run_task(task: Callable[[DictConfig], float | None], config_name: str, *overrides: str) -> None:
    """Runs ``task`` with the configuration of ``conf/<config_name>.yaml`` and the overrides on the command line.

    ``overrides`` come before those, which therefore win.

    Exits with 2 and one sentence on a :class:`UserError`; ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """

    quiet_lightning()
    sys.argv[1:1] = overrides

    def guarded(cfg: DictConfig) -> float | None:
        try:
            return task(cfg)
        except UserError as error:
            # In a sweep the failed trial is Hydra's to record.
            if os.environ.get("HYDRA_FULL_ERROR") or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            console.print(f"[bold red]error:[/] {error}", soft_wrap=True, markup=True)
            sys.exit(2)

    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)()
    except SystemExit as stop:
        if stop.code == 1:  # Hydra has printed what is wrong with the command line, but not what was meant
            _suggest(config_name)
        raise


def _suggest(config_name: str) -> None:
    """Names the keys nearest to an override that the configuration does not know."""
    overrides = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            hydra.compose(config_name, overrides)
        except (ConfigCompositionException, HydraException) as error:
            unknown = re.search(r"full_key: (\S+)", f"{error} {error.__cause__}")
            if not unknown:
                return
            good = [o for o in overrides if o.lstrip("+~").split("=")[0] != unknown[1]]
            keys = _keys(hydra.compose(config_name, good))
            near = difflib.get_close_matches(unknown[1], keys, n=3, cutoff=0.75)
            if near:
                console.print(f"Did you mean {' or '.join(near)}?", soft_wrap=True)


def _keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in cfg:
        keys.append(f"{prefix}{key}")
        child = OmegaConf.to_container(cfg, resolve=False).get(key)
        if isinstance(child, dict):
            keys += _keys(cfg._get_node(key), f"{prefix}{key}.")
    return keys
