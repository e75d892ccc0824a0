"""A Hydra callback that is created only for a sweep: Hydra creates callbacks for every job, even an invalid one."""

from functools import partialmethod
from typing import Any

from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig

from rld_lightning import forked_processes
from rld_lightning.hydra.checks.mistakes import check
from rld_lightning.hydra.script import exit_on_user_error, release_stderr

# The modules that a trial imports, one by one, so that the process notices the end of a sweep between them.
_TRIAL_MODULES = (
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
_LOCAL_LAUNCHERS = ("BasicLauncher", "SideBySideLauncher")  # launchers that start trials on this machine


class SweepOnly(Callback):
    """Checks the config, and creates the callback of sweeps, whose imports take seconds, only for a sweep.

    Args:
        of: the callback's import path.
        warm: whether the processes of trials are forked from one that has imported everything.
        options: arguments of the callback.
    """

    def __init__(self, of: str, *, warm: bool = True, **options: Any) -> None:
        self.settings = {"_target_": of, **options}
        self.warm = warm
        self.callback: Callback | None = None

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Ends a run with an invalid config before its folder is created.

        Raises:
            SystemExit: the config has mistakes; prints a sentence for each.
        """
        with exit_on_user_error():
            check(config)

    def on_multirun_start(self, config: DictConfig, **options: Any) -> None:
        """Checks the config like :meth:`on_run_start`, then starts the sweep's callback."""
        release_stderr()
        self.on_run_start(config)
        if self.warm and str(config.hydra.launcher._target_).endswith(_LOCAL_LAUNCHERS):
            forked_processes.start_server(_TRIAL_MODULES)  # imports in parallel with this process
        self.callback = instantiate(self.settings)
        assert self.callback is not None
        self.callback.on_multirun_start(config, **options)

    def _pass_on(self, event: str, *about: Any, **options: Any) -> None:
        if self.callback is not None:
            getattr(self.callback, event)(*about, **options)

    on_multirun_end = partialmethod(_pass_on, "on_multirun_end")
    on_job_start = partialmethod(_pass_on, "on_job_start")
    on_job_end = partialmethod(_pass_on, "on_job_end")
