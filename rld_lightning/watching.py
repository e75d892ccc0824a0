"""The callbacks of a trainer by their kind: Lightning does not declare the list that it keeps them in."""

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
