"""Which losses can be a part of a CUDA graph, that does the same in each step."""

from rld_lightning.losses.base import DistillationLoss, LogitLoss
from rld_lightning.losses.ce import CELoss
from rld_lightning.losses.combined import CombinedLoss


def why_no_graph(loss: DistillationLoss) -> str:
    """Why a loss is no function of logits and labels that changes with its warm-up alone; nothing where it is one."""
    losses, name = _parts(loss), type(loss).__name__
    if not all(isinstance(part, LogitLoss | CELoss | CombinedLoss) for part in losses) or loss.needs_strong_view:
        return f"{name} looks at more than the logits of one view"
    own = DistillationLoss.warmup, DistillationLoss.forward
    if any((type(part).warmup, type(part).forward) != own for part in losses):
        return f"{name} changes from step to step"
    if [*loss.parameters(), *loss.buffers()]:
        return f"{name} learns, or remembers"
    return ""


def last_warmup(loss: DistillationLoss) -> int:
    """The epoch from which on such a loss stays the same."""
    return max(part.warmup_epochs for part in _parts(loss))


def _parts(loss: DistillationLoss) -> list[DistillationLoss]:
    return [part for part in loss.modules() if isinstance(part, DistillationLoss)]
