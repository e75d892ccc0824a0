"""Parts of an optimizer step that Lightning leaves open: fused kernels, and the weight of each accumulated batch."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def fused(make: Callable[..., Optimizer], trainer: "Trainer", device: torch.device) -> dict[str, bool]:
    """Returns ``fused=True`` if a GPU optimizer can update all weights in one kernel and no implementation was chosen.

    Not with gradient clipping or scaling: Lightning refuses the first, and callbacks would see scaled gradients.
    """
    if device.type != "cuda":
        return {}
    ways = ("fused", "foreach", "capturable", "differentiable")
    chosen = set(ways) & set(getattr(make, "keywords", {})) or "fused" not in inspect.signature(make).parameters
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    return {} if chosen or scaled or trainer.gradient_clip_val else {"fused": True}


def accumulation_factor(trainer: "Trainer", batch_idx: int) -> float:
    """Returns the factor on a batch's mean loss with which an optimizer step averages over all images of its batches.

    Lightning divides each loss by ``accumulate_grad_batches``, also in an epoch's last step, which may have fewer and
    smaller batches. The factor is 1 if the number of batches is unknown.
    """
    every, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if every == 1 or batches == float("inf"):
        return 1.0
    steps = getattr(getattr(trainer.train_dataloader, "sampler", None), "steps", None)
    first = batch_idx - batch_idx % every
    last = min(first + every, int(batches))  # batches of this optimizer step
    sizes = [1] * (last - first) if steps is None else [step.stop - step.start for step in steps[first:last]]
    return every * sizes[batch_idx - first] / sum(sizes)
