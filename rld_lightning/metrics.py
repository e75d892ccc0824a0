"""Means over an epoch and all ranks, with one collective at its end; and what chance makes of an accuracy."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from rld_lightning.distributed import gathered, own_share
from rld_lightning.errors import UserError, some

_WEIGHT = "weight"  # beside the names in a state


class EpochMeans:
    """Weighted means of named scalars.

    Not ``self.log(..., sync_dist=True)``: the progress bar, which lives on rank 0 alone, would start that reduction on
    its own and leave the ranks waiting in different collectives. Not ``torchmetrics.MeanMetric`` either: it looks for
    NaN at every update, which makes an accelerator wait. An update here only launches kernels.
    """

    def __init__(self) -> None:
        self.samples = 0  # behind the latest means
        self._names: tuple[str, ...] = ()
        self._totals: Tensor | None = None

    def update(self, values: Mapping[str, Tensor], weight: int) -> None:
        """Counts scalars, the same names each time, as the means of ``weight`` samples."""
        self.add(values, counts(values.values(), weight))

    def add(self, names: Iterable[str], counted: Tensor) -> None:
        """As :meth:`update`, of what :func:`counts` has made of the scalars of these names."""
        names, before = tuple(names), self._names
        if self._totals is not None and names != before:
            raise UserError(
                f"the epoch so far has means of {some(before)}, and this step has {some(names)}: the checkpoint is of "
                "another loss; resume from another one, or begin anew in another folder."
            )
        self._names = names
        # Not the same tensor: what a graph computes is overwritten by its next replay.
        self._totals = counted.clone() if self._totals is None else self._totals.to(counted.device) + counted

    def reset(self) -> None:
        """Begins to count anew."""
        self._totals = None

    def compute(self, reduce: Callable[..., Tensor]) -> dict[str, Tensor]:
        """The means since the last reset, the same on all ranks; empty when nothing was counted.

        Args:
            reduce: sums a tensor over the ranks, as ``trainer.strategy.reduce(tensor, reduce_op="sum")`` does.
        """
        if self._totals is None:
            return {}
        *sums, weight = reduce(self._totals.clone(), reduce_op="sum").unbind()  # which may work in place
        self.samples = round(weight.item())
        return {name: (total / weight).float() for name, total in zip(self._names, sums, strict=True)}

    def state_dict(self) -> list[dict[str, Tensor]]:
        """What was counted since the last reset, by rank: a collective."""
        names = (*self._names, _WEIGHT)
        return gathered({} if self._totals is None else dict(zip(names, self._totals.unbind(), strict=True)))

    def load_state_dict(self, states: list[dict[str, Tensor]]) -> None:
        """Goes on from there, with as many ranks as then or others.

        Raises:
            UserError: these are no such counts.
        """
        counted = [value for state in states for value in state.values()]
        if not all(isinstance(value, Tensor) and value.shape == () for value in counted):
            raise UserError(
                "the checkpoint has other than single numbers among what its epoch has counted; resume from another "
                "one, or begin anew in another folder."
            )
        own = own_share(states)
        self._names = tuple(name for name in own if name != _WEIGHT)
        self._totals = torch.stack([own[name] for name in (*self._names, _WEIGHT)]) if own else None


def counts(values: Iterable[Tensor], weight: int) -> Tensor:
    """Scalars as the means of ``weight`` samples: each times that, and the weight itself, float64 ``(N + 1,)``."""
    counted = torch.stack([value.detach() for value in values])
    if counted.device.type != "mps":  # which has no float64
        counted = counted.double()
    # The means of no samples are NaN, and so is zero times that.
    counted = counted * weight if weight else torch.zeros_like(counted)
    return torch.cat([counted, counted.new_full((1,), weight)])


def top_k_percent(logits: Tensor, label: Tensor, k: int) -> Tensor:
    """Share of the rows ``(N, C)`` whose label is among the k largest, in percent."""
    found = logits.argmax(1) == label if k == 1 else (logits.topk(k).indices == label[:, None]).any(1)
    return 100 * (found.float() if found.device.type == "mps" else found.double()).mean()  # which has no float64


def term_shares(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``stats/<term>_share`` of each ``train/<term>``, in percent of ``train/loss``.

    Returns:
        nothing where the loss has a single term, or is 0.
    """
    terms = {name.removeprefix("train/"): mean for name, mean in means.items() if name.startswith("train/")}
    total = terms.pop("loss", None)
    if len(terms) < 2 or not total:
        return {}
    return {f"stats/{name}_share": 100 * mean / total for name, mean in terms.items()}


def luck(percent: float, images: int) -> float:
    """Three standard deviations of an accuracy measured on so many images, in points."""
    return 3 * math.sqrt(percent * (100 - percent) / images)
