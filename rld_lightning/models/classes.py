"""The classes of a network, put into another order."""

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn

from rld_lightning.errors import did_you_mean, some
from rld_lightning.models.factory import blueprint, create_model


def order_of(known: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Where each of the wanted classes stands among the known ones.

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
        order: for each logit to come, its place among those that there are.
    """
    network.load_state_dict(_moved(network, name, order, len(order)))


def select_classes(network: nn.Module, name: str, order: Sequence[int], count: int) -> nn.Module:
    """A network like another one that knows some of its classes alone, in an order of their own.

    Args:
        order: for each logit to come, its place among those that there are.
        count: how many there are.
    """
    moved = _moved(network, name, order, count)
    fewer = create_model(name, len(order))
    fewer.load_state_dict(moved)
    return fewer


def _moved(network: nn.Module, name: str, order: Sequence[int], count: int) -> dict[str, Tensor]:
    index = torch.tensor(order)
    moved = network.state_dict()
    for key, dim in _class_dims(name, count):
        moved[key] = moved[key].index_select(dim, index)
    return moved


def number_of_classes(name: str, state_dict: Mapping[str, Tensor]) -> int | None:
    """How many classes weights are for, by the shapes of a network; None where they are another network's."""
    found = {
        state_dict[key].shape[dim]
        for key, dim in _class_dims(name, 2)
        if key in state_dict and state_dict[key].ndim > dim
    }
    return found.pop() if len(found) == 1 else None


def _class_dims(name: str, count: int) -> list[tuple[str, int]]:
    """The tensors of a network, and their dimensions, that have an entry for each class."""
    few, many = (_shapes(name, count + more) for more in (0, 1))
    return [
        (key, dim)
        for key, shape in few.items()
        for dim, (extent, other) in enumerate(zip(shape, many[key], strict=True))
        if extent != other
    ]


def places_of(
    classes: Sequence[str], known: Sequence[str] | None, count: int, class_map: Mapping[str, str | int] | None
) -> list[int]:
    """Where each class of the data stands among those of a teacher.

    Args:
        known: the teacher's, in the order of its logits; None where it does not name them.
        class_map: for classes of the data the teacher's name, or place from 0 on; the others have the same name.

    Raises:
        ValueError: a class is in no place, two are in one, or the map speaks of others.
    """
    class_map = class_map or {}
    if strangers := sorted(set(class_map) - set(classes)):
        raise ValueError(
            f"model.teacher.class_map names {some(strangers)}, which the data does not have."
            f"{did_you_mean(strangers[0], classes)} It is {{<class of the data>: <class of the teacher>}}."
        )
    place: dict[str | int, int] = {number: number for number in range(count)}
    place |= {name: number for number, name in enumerate(known or ())}
    wanted = {name: class_map.get(name, name) for name in classes}
    if lost := {name: target for name, target in wanted.items() if target not in place}:
        missing = some(f"{name!r} ({target!r})" for name, target in lost.items())
        names = f"such as {some(map(repr, known))}" if known else "which has no names for them"
        raise ValueError(
            f"the teacher has no class for {missing}; say which of its {count:,}, {names}, it is with "
            f"model.teacher.class_map={{{next(iter(lost))}:<its name, or its number from 0 on>}}."
        )
    places = [place[target] for target in wanted.values()]
    if len(set(places)) < len(places):
        twice = next(name for name, found in zip(classes, places, strict=True) if places.count(found) > 1)
        raise ValueError(
            f"{twice!r} and another class of the data are the same of the teacher's (model.teacher.class_map)."
        )
    return places


def read_class_map(path: Path) -> dict[str, str | int]:
    """Reads which class is which: lines ``class of the data,class of the teacher``, by name or number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has other lines.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file at {path}, which model.teacher.class_map names.")
    rows = [row for row in csv.reader(StringIO(path.read_text())) if row]
    if any(len(row) != 2 or not all(row) for row in rows):
        raise ValueError(f"{path} has other lines than <class of the data>,<class of the teacher>, one a class.")
    return {name: int(target) if target.isdecimal() else target for name, target in rows}


def _shapes(name: str, num_classes: int) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in blueprint(name, num_classes).state_dict().items()}
