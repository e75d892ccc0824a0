"""Prunes trials of an Optuna sweep that fall behind the others."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from rld_lightning.console import print_line

if TYPE_CHECKING:
    import optuna


class OptunaPruner(Callback):
    """Reports ``val/top1`` of each epoch to the study, and stops the trial if Optuna's pruner decides so.

    The sweeper asks the study for values and passes them to a process; the trial is identified by these values. A
    pruned trial ends with its current accuracy, and the sweeper reports it to the study.

    Args:
        storage: URL of the study's storage.
        study_name: the study's name there.
        overrides: the trial's overrides, ``key=value``.
        pruner: one of ``optuna.pruners``.

    Raises:
        ValueError: when training starts: no running trial of the study has these values.
    """

    def __init__(
        self, storage: str, study_name: str, overrides: Sequence[str], pruner: "optuna.pruners.BasePruner"
    ) -> None:
        self.storage = storage
        self.study_name = study_name
        self.overrides = set(overrides)
        self.pruner = pruner
        self.trial: optuna.Trial | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the trial, on rank 0."""
        if trainer.is_global_zero:
            self.trial = self._find()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports the epoch's accuracy, and stops all ranks together if the trial is pruned."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        epoch = trainer.current_epoch + 1
        prune = False
        if self.trial is not None:
            self.trial.report(float(trainer.callback_metrics["val/top1"]), epoch)
            prune = self.trial.should_prune()
        if trainer.strategy.broadcast(prune):
            print_line("pruned", f"after epoch {epoch}, in which most other trials were better")
            trainer.should_stop = True

    def _find(self) -> "optuna.Trial":
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.load_study(study_name=self.study_name, storage=self.storage, pruner=self.pruner)
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if trial.params and {f"{key}={value}" for key, value in trial.params.items()} <= self.overrides:
                return optuna.Trial(study, trial._trial_id)
        raise ValueError(
            f"no running trial of the study {self.study_name} in {self.storage} has the values of this run; the pruner "
            "is for sweeps by Optuna (sweep=rld_optuna)."
        )
