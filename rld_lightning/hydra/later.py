"""A callback of Hydra's that is made when a sweep begins: Hydra makes all callbacks of every job, also of a mistake."""

from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig

from rld_lightning import forked_processes
from rld_lightning.hydra.checks.mistakes import check
from rld_lightning.hydra.script import composed, exit_on_user_error

# What a trial imports sooner or later, in an order in which the end of a sweep is noticed in between.
_OF_TRIALS = (
    "torch",
    "torchvision",
    "lightning.pytorch",
    "sklearn.datasets",
    "pandas",
    "rld_lightning.reporting.curves",
    "matplotlib.backends.backend_agg",
    "rld_lightning.losses.features",
    "rld_lightning.tasks.run.processes",
    "rld_lightning.tasks.trial",
    "rld_lightning.tasks.sweep",
    "rld_lightning.hydra.sweeps.side_by_side",
)
_HERE = ("BasicLauncher", "SideBySideLauncher")  # those that start trials on this machine


class Later(Callback):
    """Checks the configuration, and makes a callback for sweeps, whose imports take seconds, where there is a sweep.

    Args:
        of: the callback's import path.
        warm: whether the processes of trials are forked from one that has imported everything.
        options: what it takes.
    """

    def __init__(self, of: str, *, warm: bool = True, **options: Any) -> None:
        self.settings = {"_target_": of, **options}
        self.warm = warm
        self.callback: Callback | None = None

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Ends a run whose configuration is a mistake before it has a folder.

        Raises:
            SystemExit: it is; with a sentence for each.
        """
        with exit_on_user_error():
            check(config)

    def on_multirun_start(self, config: DictConfig, **options: Any) -> None:
        """As :meth:`on_run_start`; then the sweep begins."""
        composed()
        self.on_run_start(config)
        if self.warm and str(config.hydra.launcher._target_).endswith(_HERE):
            forked_processes.start_server(_OF_TRIALS)  # which imports while this process does
        self.callback = instantiate(self.settings)
        assert self.callback is not None
        self.callback.on_multirun_start(config, **options)

    def on_multirun_end(self, config: DictConfig, **options: Any) -> None:
        """Of a sweep."""
        if self.callback is not None:
            self.callback.on_multirun_end(config, **options)

    def on_job_start(self, config: DictConfig, **options: Any) -> None:
        """Of a trial."""
        if self.callback is not None:
            self.callback.on_job_start(config, **options)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **options: Any) -> None:
        """Of a trial."""
        if self.callback is not None:
            self.callback.on_job_end(config, job_return, **options)
