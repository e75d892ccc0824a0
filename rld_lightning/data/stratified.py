"""Stratified shares of a data set: held-out images, and subsets for quick trials."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rld_lightning.errors import some


def stratified_split(
    labels: Tensor, fraction: float, seed: int, name: str = "fraction", class_names: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Splits samples in two, both with the class frequencies of the whole.

    Args:
        labels: classes, int64 ``(N,)``.
        fraction: share of the samples to hold out, in (0, 1).
        seed: seed of the split.
        name: the caller's name of the fraction, for error messages.
        class_names: the names of the classes, for error messages.

    Returns:
        the sorted positions of the kept and of the held-out samples, int64.

    Raises:
        ValueError: a class has a single sample, or the fraction is too small or large for all classes.
    """
    from sklearn.model_selection import train_test_split  # here, as the import takes a second

    try:
        kept, held_out = train_test_split(
            torch.arange(len(labels)).numpy(), test_size=fraction, random_state=seed, stratify=labels.numpy()
        )
    except ValueError as error:
        lone = [class_names[index] for index in (labels.bincount() == 1).nonzero().flatten() if class_names]
        if lone:
            raise ValueError(
                f"{name}={fraction} holds some images of each class out, and there is only one of "
                f"{some(map(repr, lone))}: add images of it, or leave the class out."
            ) from error
        raise ValueError(
            f"{name}={fraction} of {len(labels)} images in {len(labels.unique())} classes cannot leave every class "
            "an image on both sides: choose another fraction or add images."
        ) from error
    return torch.from_numpy(kept).sort().values, torch.from_numpy(held_out).sort().values


def stratified_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Chooses a fraction of the samples of each class, at least one.

    With the same seed, a smaller fraction gives a subset of a larger one's.

    Args:
        labels: classes, int64 ``(N,)``.
        fraction: share of the samples to choose, in (0, 1].
        seed: seed of the choice.

    Returns:
        the sorted positions of the chosen samples, int64.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    chosen = (fraction * counts).round().clamp(min=1)
    return order[place < chosen[labels[order]]].sort().values
