"""What a job's folder must be before Hydra writes into it."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from rld_lightning.hydra.script import exit_on_user_error
from rld_lightning.runs.folder import check_folder


class CheckFolder(Callback):
    """Ends a job in one sentence whose folder cannot be written to, or leads elsewhere by a link."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Looks at the folder of a single job."""
        with exit_on_user_error():  # Hydra would make a warning of it
            check_folder(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Looks at the folder of a sweep."""
        with exit_on_user_error():
            check_folder(Path(config.hydra.sweep.dir))
