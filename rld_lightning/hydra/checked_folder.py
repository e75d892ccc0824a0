"""Checks a job's folder before Hydra writes into it."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from rld_lightning.hydra.script import exit_on_user_error
from rld_lightning.hydra.unused_folder import note_missing_folders
from rld_lightning.runs.folder import check_folder


class CheckFolder(Callback):
    """Ends a job with one sentence if its folder is not writable or is behind a link."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Checks the folder of a single job."""
        with exit_on_user_error(), _hydra_config(config):  # Hydra turns exceptions of callbacks into warnings
            check_folder(folder := Path(config.hydra.run.dir))
            note_missing_folders(folder)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Checks the folder of a sweep."""
        with exit_on_user_error(), _hydra_config(config):
            check_folder(Path(config.hydra.sweep.dir))


@contextmanager
def _hydra_config(config: DictConfig) -> Iterator[None]:
    """Sets the config that resolves ``${hydra:...}``, which Hydra does only when a job starts."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(deepcopy(config))  # ``set_config`` makes its argument read-only
    try:
        yield
    finally:
        hydra.cfg = before
