"""Access to a trainer's callbacks, and ways to make them, and what they log, cheap."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from torch import Tensor

Kind = TypeVar("Kind", bound="Callback")
_NOTHING = nullcontext()


def callbacks_of(trainer: "Trainer", kind: type[Kind]) -> list[Kind]:
    """Returns the callbacks of this class or a subclass, in call order; Lightning does not declare their list."""
    return [callback for callback in vars(trainer)["callbacks"] if isinstance(callback, kind)]


@runtime_checkable
class Watcher(Protocol):
    """A callback whose measurement of a step can be captured in the step's CUDA graph.

    After a captured step, :func:`measured_in_graph` returns the measurement to the callback's hooks; the next step
    overwrites it. After any other step it returns None, and the callback calls its own method.
    """

    def measure_step(self, pl_module: Any, outputs: Any, batch: Any) -> "Tensor | None":
        """Measures a step after its backward pass, without synchronising with the device or changing anything.

        Args:
            pl_module: the module, whose parameters have their gradients.
            outputs: those of ``on_train_batch_end``, without ``loss``.
            batch: its images, label, index and view.
        """


def measured_in_graph(watcher: Watcher, pl_module: Any) -> "Tensor | None":
    """Returns a watcher's measurement of the latest step; None if that was not captured."""
    return getattr(pl_module, "measurements", {}).get(watcher)


def shown_by_lightning(trainer: "Trainer") -> bool:
    """Whether Lightning's progress bar displays values logged with ``prog_bar=True``.

    If it does, Lightning reads such values from the device in each step, which makes it wait for the previous one. A
    bar with ``reads_values_itself`` does not need them.
    """
    bar = trainer.progress_bar_callback
    return bar is not None and not getattr(bar, "reads_values_itself", False)


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
    """Stops Lightning from calling hooks that a callback does not implement.

    Lightning calls every hook of every callback and builds a profiler name for each call; with a dozen callbacks this
    takes as long as launching a small network's step. It skips attributes that are not callable.
    """
    from lightning.pytorch import Callback  # here: this module's other users import it anyway

    for callback in callbacks_of(trainer, Callback):
        for hook in _EACH_STEP:
            if getattr(getattr(callback, hook), "__func__", None) is getattr(Callback, hook):
                setattr(callback, hook, None)


def skip_idle_profiler(trainer: "Trainer") -> None:
    """Replaces what Lightning does to profile nothing: it enters a generator 30 times a step."""
    from lightning.pytorch.profilers import PassThroughProfiler

    profiler = vars(trainer)["profiler"]  # not declared by Lightning
    if type(profiler) is PassThroughProfiler:
        vars(profiler)["profile"] = _profile_nothing


def _profile_nothing(action_name: str) -> AbstractContextManager[None]:
    return _NOTHING


def log_in_place(trainer: "Trainer") -> None:
    """Stops Lightning from moving the sum of a logged value to the device on which it already is.

    To move it, each ``log`` searches whatever Lightning knows of the value for tensors: three quarters of the call.
    """
    from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection

    class InPlace(_ResultCollection):
        def __setitem__(self, name: str, logged: Any) -> None:
            if logged.is_tensor:  # and no metric with a state of its own
                move = logged.to
                logged.to = lambda device: logged if device == logged.value.device else move(device)
            super().__setitem__(name, logged)

    for loop in (trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop):
        loop._results = InPlace(loop._results.training)
