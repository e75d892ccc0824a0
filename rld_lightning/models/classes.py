"""The classes of a network, put into another order."""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import nn

from rld_lightning.models.factory import create_model


def order_of(known: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Where each of the wanted classes stands among the known ones.

    Args:
        known: the classes of a network, in the order of its logits.
        wanted: the same names in another order.

    Returns:
        positions by wanted class; None where the names are others, or not all different.
    """
    place = {name: position for position, name in enumerate(known)}
    if len(place) != len(known) or len(wanted) != len(known) or set(wanted) != place.keys():
        return None
    return [place[name] for name in wanted]


def reorder_classes(network: nn.Module, name: str, order: Sequence[int]) -> None:
    """Moves whatever a network has for each class, so that its logits come in another order.

    In the weights and not behind them, so that methods that read the classifier see the new order, too.

    Args:
        network: on the CPU.
        name: what it is called, for :func:`~rld_lightning.models.create_model`.
        order: for each logit to come, its place among those that there are.
    """
    index = torch.tensor(order)
    few, many = (_shapes(name, len(order) + more) for more in (0, 1))
    moved = network.state_dict()
    for key, shape in few.items():
        for dim, (extent, other) in enumerate(zip(shape, many[key], strict=True)):
            if extent != other:
                moved[key] = moved[key].index_select(dim, index)
    network.load_state_dict(moved)


def _shapes(name: str, num_classes: int) -> dict[str, torch.Size]:
    with suppress(NotImplementedError), torch.device("meta"):
        return {key: value.shape for key, value in create_model(name, num_classes).state_dict().items()}
    # RegNets compute widths with tensors, which meta ones refuse.
    return {key: value.shape for key, value in create_model(name, num_classes).state_dict().items()}
