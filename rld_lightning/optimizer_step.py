"""What Lightning leaves to others of an optimizer's step: its kernels, and how much each of its batches counts."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def fused(make: Callable[..., Optimizer], trainer: "Trainer", device: torch.device) -> dict[str, bool]:
    """Has an optimizer update all weights in one kernel on a GPU, where it can and nobody has chosen.

    Not where gradients are clipped or scaled: Lightning refuses the first, and watchers would see them scaled.
    """
    if device.type != "cuda":
        return {}
    ways = ("fused", "foreach", "capturable", "differentiable")
    chosen = set(ways) & set(getattr(make, "keywords", {})) or "fused" not in inspect.signature(make).parameters
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    return {} if chosen or scaled or trainer.gradient_clip_val else {"fused": True}


def share_of_step(trainer: "Trainer", batch_idx: int) -> float:
    """Factor on a batch's mean loss that makes an optimizer step one on the mean over all images of its batches.

    Lightning divides each by ``accumulate_grad_batches``, also in the last step of an epoch, which may have fewer and
    smaller batches. It is 1 where nobody knows how many batches come.
    """
    every, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if every == 1 or batches == float("inf"):
        return 1.0
    steps = getattr(getattr(trainer.train_dataloader, "sampler", None), "steps", None)
    first = batch_idx - batch_idx % every
    last = min(first + every, int(batches))  # of the batches that make this step of the optimizer
    sizes = [1] * (last - first) if steps is None else [step.stop - step.start for step in steps[first:last]]
    return every * sizes[batch_idx - first] / sum(sizes)
