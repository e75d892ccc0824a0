"""Means over an epoch and all ranks with one collective at its end, and the sampling error of an accuracy."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.distributed import gathered, own_part
from rld_lightning.errors import UserError, some
from rld_lightning.mps import widest_float

_WEIGHT = "weight"  # its key in a state, beside the names


class EpochMeans:
    """Weighted means of named scalars.

    Not ``self.log(..., sync_dist=True)``: the progress bar, on rank 0 only, would trigger that reduction alone and
    leave the ranks waiting in different collectives. Nor ``torchmetrics.MeanMetric``: its check for NaN at every update
    synchronises with the accelerator. An update here only launches kernels.
    """

    def __init__(self) -> None:
        self.samples = 0  # number of samples in the latest means
        self._names: tuple[str, ...] = ()
        self._totals: Tensor | None = None

    def update(self, values: Mapping[str, Tensor], weight: int) -> None:
        """Adds scalars, the same names each time, that are means over ``weight`` samples."""
        self.add(values, counts(values.values(), weight))

    def add(self, names: Iterable[str], counted: Tensor) -> None:
        """Adds the scalars of these names, as :func:`counts` has weighted them."""
        names, before = tuple(names), self._names
        if self._totals is not None and names != before:
            raise UserError(
                f"the epoch so far has means of {some(before)}, and this step has {some(names)}: the checkpoint is of "
                "another loss; resume from another checkpoint, or start a new run in another folder."
            )
        self._names = names
        # A copy: a CUDA graph's next replay overwrites its outputs.
        self._totals = counted.clone() if self._totals is None else self._totals.to(counted.device) + counted

    def reset(self) -> None:
        """Discards what was added."""
        self._totals = None

    def compute(self, reduce: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Returns the means since the last reset, the same on all ranks, on the CPU; empty if nothing was added.

        Args:
            reduce: sums a tensor over the ranks, such as ``trainer.strategy.reduce(tensor, reduce_op="sum")``.
        """
        if self._totals is None:
            return {}
        # A clone: it may reduce in place. To the CPU at once: from here on each value is logged, compared and written.
        *sums, weight = reduce(self._totals.clone(), reduce_op="sum").cpu().unbind()
        self.samples = round(weight.item())
        return {name: (total / weight).float() for name, total in zip(self._names, sums, strict=True)}

    def state_dict(self) -> list[dict[str, Tensor]]:
        """Returns the sums since the last reset, by rank; a collective."""
        names = (*self._names, _WEIGHT)
        return gathered({} if self._totals is None else dict(zip(names, self._totals.cpu().unbind(), strict=True)))

    def load_state_dict(self, states: list[dict[str, Tensor]]) -> None:
        """Restores the sums, also with another number of ranks.

        Raises:
            UserError: the states are not such sums.
        """
        counted = [value for state in states for value in state.values()]
        if not all(isinstance(value, Tensor) and value.shape == () for value in counted):
            raise UserError(
                "the checkpoint's sums of its epoch so far contain other values than single numbers; resume from "
                "another checkpoint, or start a new run in another folder."
            )
        own = own_part(states)
        self._names = tuple(name for name in own if name != _WEIGHT)
        self._totals = torch.stack([own[name] for name in (*self._names, _WEIGHT)]) if own else None


def counts(values: Iterable[Tensor], weight: int) -> Tensor:
    """Multiplies scalars, means over ``weight`` samples, by the weight and appends it.

    Returns ``(N + 1,)``, in float64 if the device has it.

    The scalars may already be stacked.
    """
    counted = values if isinstance(values, Tensor) else torch.stack([value.detach() for value in values])
    counted = counted.to(widest_float(counted.device))
    # Means over no samples are NaN, and so is zero times NaN.
    counted = counted * weight if weight else torch.zeros_like(counted)
    return F.pad(counted, (0, 1), value=weight)


def top_k_percent(logits: Tensor, label: Tensor, k: int) -> Tensor:
    """Returns the percentage of rows ``(N, C)`` whose label is among the k largest."""
    correct = logits.argmax(1) == label if k == 1 else (logits.topk(k, sorted=False).indices == label[:, None]).any(1)
    return percent(correct)


def percent(true: Tensor) -> Tensor:
    """Returns the percentage of True along the last dimension, in float64 if the device has it."""
    return 100 * true.mean(-1, dtype=widest_float(true.device))


def term_shares(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns ``stats/<term>_share`` of each ``train/<term>``, in percent of ``train/loss``.

    Returns:
        an empty mapping if the loss has a single term, or is 0.
    """
    terms = {name.removeprefix("train/"): mean for name, mean in means.items() if name.startswith("train/")}
    total = terms.pop("loss", None)
    if len(terms) < 2 or not total:
        return {}
    return {f"stats/{name}_share": 100 * mean / total for name, mean in terms.items()}


def sampling_error(percent: float, images: int) -> float:
    """Returns three standard deviations, in points, of an accuracy measured on this many images."""
    return 3 * math.sqrt(percent * (100 - percent) / images)
