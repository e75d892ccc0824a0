"""The callbacks of a trainer, in a list that Lightning keeps and does not declare."""

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

Kind = TypeVar("Kind", bound="Callback")


def callbacks_of(trainer: "Trainer", kind: type[Kind]) -> list[Kind]:
    """Those that are of a class, or of one below it, in the order in which they are called.

    Args:
        trainer: the run's.
        kind: the class.
    """
    return [callback for callback in vars(trainer)["callbacks"] if isinstance(callback, kind)]


_EACH_STEP = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
)


def skip_idle_hooks(trainer: "Trainer") -> None:
    """Has no callback called in a step that does nothing there.

    Lightning calls every hook of every callback, each under a profiler's name put together anew; of a dozen callbacks
    that takes as long as launching a small network's step. It passes over what cannot be called.

    Args:
        trainer: with all its callbacks.
    """
    from lightning.pytorch import Callback  # here: others of this module's callers have it imported anyway

    for callback in callbacks_of(trainer, Callback):
        for hook in _EACH_STEP:
            if getattr(getattr(callback, hook), "__func__", None) is getattr(Callback, hook):
                setattr(callback, hook, None)
