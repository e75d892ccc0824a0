"""Which losses can be captured in a CUDA graph, which repeats the same operations in every step."""

from rld_lightning.losses.base import DistillationLoss, LogitLoss
from rld_lightning.losses.ce import CELoss
from rld_lightning.losses.combined import CombinedLoss


def why_no_graph(loss: DistillationLoss) -> str:
    """Returns why a loss cannot be captured, or an empty string.

    It can if it is a function of one view's logits and labels that changes with its warm-up only.
    """
    losses, name = _parts(loss), type(loss).__name__
    if not all(isinstance(part, LogitLoss | CELoss | CombinedLoss) for part in losses) or loss.needs_strong_view:
        return f"{name} uses more than the logits of one view"
    base = DistillationLoss.warmup, DistillationLoss.forward
    if any((type(part).warmup, type(part).forward) != base for part in losses):
        return f"{name} changes from step to step"
    if [*loss.parameters(), *loss.buffers()]:
        return f"{name} has parameters or buffers"
    return ""


def last_warmup(loss: DistillationLoss) -> int:
    """Returns the last epoch of the warm-up, from which on the loss no longer changes."""
    return max(part.warmup_epochs for part in _parts(loss))


def _parts(loss: DistillationLoss) -> list[DistillationLoss]:
    return [part for part in loss.modules() if isinstance(part, DistillationLoss)]
