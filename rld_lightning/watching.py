"""The callbacks of a trainer, in a list that Lightning keeps and does not declare, and what they cost a step."""

from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from torch import Tensor

Kind = TypeVar("Kind", bound="Callback")


def callbacks_of(trainer: "Trainer", kind: type[Kind]) -> list[Kind]:
    """Those that are of a class, or of one below it, in the order in which they are called."""
    return [callback for callback in vars(trainer)["callbacks"] if isinstance(callback, kind)]


@runtime_checkable
class Watcher(Protocol):
    """A callback that says apart what it computes of a step, so that this is a part of the step's CUDA graph.

    Of a step that was launched as one, :func:`seen_in_step` has what it returned when the callback's hooks are called;
    the next step overwrites it. Else there is nothing, and they compute it themselves.
    """

    def look_at_step(self, pl_module: Any, outputs: Any, batch: Any) -> "Tensor | None":
        """What it counts of a step, after the backward pass; it reads nothing from the device and changes nothing.

        Args:
            pl_module: the module, whose parameters have their gradients.
            outputs: as ``on_train_batch_end`` gets them, without ``loss``.
            batch: likewise; of it, images, label, index and view.
        """


def seen_in_step(watcher: Watcher, pl_module: Any) -> "Tensor | None":
    """What a watcher saw of the latest step, where that was launched as a graph."""
    return getattr(pl_module, "seen", {}).get(watcher)


def shown_by_lightning(trainer: "Trainer") -> bool:
    """Whether there is a bar that shows what is logged for it (``prog_bar=True``).

    Lightning reads such values from the device in each step, which so waits for the one before; a bar that
    ``reads_by_itself`` needs none of them.
    """
    bar = trainer.progress_bar_callback
    return bar is not None and not getattr(bar, "reads_by_itself", False)


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
    """
    from lightning.pytorch import Callback  # here: others of this module's callers have it imported anyway

    for callback in callbacks_of(trainer, Callback):
        for hook in _EACH_STEP:
            if getattr(getattr(callback, hook), "__func__", None) is getattr(Callback, hook):
                setattr(callback, hook, None)
