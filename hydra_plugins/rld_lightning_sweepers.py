"""The sweepers whose options ``rld_lightning.hydra.options`` has: Hydra takes sweepers from this namespace alone.

Hydra imports this file at every start, of help and completion, too; what a sweep needs is imported when it begins.
"""

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(BasicSweeper):
    """Every value of each key with every value of the others, as Hydra's own; a failed trial does not end the others.

    Args:
        max_batch_size: how many trials a launcher gets at a time; null gives it all.
        params: what is swept besides what the command says.
    """

    def sweep(self, arguments: list[str]) -> None:
        """Runs all trials."""
        from rld_lightning.hydra.sweeps.sweepers import sweep_grid

        sweep_grid(self, arguments)


class OptunaSweeper(Sweeper):
    """What a study of Optuna's proposes: for ``choice()``, ``range()``, ``interval()`` and ``tag(log, interval())``.

    Args:
        study_name: its name in the storage.
        storage: by itself ``study.db`` in the sweep's folder; null keeps it in memory, where no sweep goes on from.
        direction: ``maximize`` or ``minimize``.
        n_trials: in all, those of an interrupted sweep included.
        n_jobs: trials that are proposed together; -1 for one a core.
        sampler: one of Optuna's, ``hydra/sweeper/sampler=tpe``, ``random`` or ``grid``, or any by ``_target_``.
        params: what is swept besides what the command says.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Takes what Hydra hands over."""
        from hydra.core.plugins import Plugins

        self.config = config
        self.loader = hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Asks the study for trials and tells it what they came to."""
        from rld_lightning.hydra.sweeps.sweepers import sweep_study

        sweep_study(self.config, self.launcher, self.loader, self.options, arguments)
