"""The launcher of ``launcher=joblib``: Hydra takes launchers from this namespace alone.

Hydra imports this file at every start, of help and completion, too; what a sweep needs is imported when it begins.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SideBySideLauncher(Launcher):
    """Trials side by side on this machine, each in a process of its own, the GPUs shared out among them.

    Args:
        n_jobs: how many at a time.
    """

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Takes what Hydra hands over."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs trials; one that fails, or is killed, does not end the others."""
        from rld_lightning.hydra.sweeps.side_by_side import Jobs

        context: Any = self.hydra_context
        jobs = Jobs(context, self.config, self.task_function, self.n_jobs)
        return jobs.run([list(overrides) for overrides in job_overrides], initial_job_idx)
