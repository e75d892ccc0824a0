"""What a job's folder must be before Hydra writes into it."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from rld_lightning.hydra.cleared import will_make
from rld_lightning.hydra.script import exit_on_user_error
from rld_lightning.runs.folder import check_folder


class CheckFolder(Callback):
    """Ends a job in one sentence whose folder cannot be written to, or leads elsewhere by a link."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Looks at the folder of a single job."""
        with exit_on_user_error(), _answered(config):  # Hydra would make a warning of it
            check_folder(folder := Path(config.hydra.run.dir))
            will_make(folder)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Looks at the folder of a sweep."""
        with exit_on_user_error(), _answered(config):
            check_folder(Path(config.hydra.sweep.dir))


@contextmanager
def _answered(config: DictConfig) -> Iterator[None]:
    """Answers ``${hydra:...}``, which Hydra does from the beginning of a job on."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(deepcopy(config))  # which it makes read-only
    try:
        yield
    finally:
        hydra.cfg = before
