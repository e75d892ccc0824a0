"""Reordering and matching the classes of a network."""

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn

from rld_lightning.errors import did_you_mean, some
from rld_lightning.models.factory import blueprint, create_model


def class_order(known: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Returns the position of each wanted class among the known ones.

    Returns:
        positions by wanted class; None if the two sets of names differ, or names repeat.
    """
    place = {name: position for position, name in enumerate(known)}
    if len(place) != len(known) or len(wanted) != len(known) or set(wanted) != place.keys():
        return None
    return [place[name] for name in wanted]


def reorder_classes(network: nn.Module, name: str, order: Sequence[int]) -> None:
    """Permutes a network's weights so that its logits are in another order.

    The weights change rather than the output, so that methods that read the classifier see the new order too.

    Args:
        order: the current position of each new logit.
    """
    network.load_state_dict(_moved(network, name, order, len(order)))


def select_classes(network: nn.Module, name: str, order: Sequence[int], count: int) -> nn.Module:
    """Returns a copy of a network for a subset of its classes, in a given order.

    Args:
        order: the current position of each new logit.
        count: number of classes of the given network.
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
    """Infers the number of classes of weights from the network's shapes; None if they belong to another network."""
    counts = {
        state_dict[key].shape[dim]
        for key, dim in _class_dims(name, 2)
        if key in state_dict and state_dict[key].ndim > dim
    }
    return counts.pop() if len(counts) == 1 else None


def _class_dims(name: str, count: int) -> list[tuple[str, int]]:
    """Returns the keys of a network's tensors, with their dimensions, that have one entry per class."""
    few, many = (_shapes(name, count + more) for more in (0, 1))
    return [
        (key, dim)
        for key, shape in few.items()
        for dim, (extent, other) in enumerate(zip(shape, many[key], strict=True))
        if extent != other
    ]


def class_positions(
    classes: Sequence[str], known: Sequence[str] | None, count: int, class_map: Mapping[str, str | int] | None
) -> list[int]:
    """Returns the position of each class of the data among a teacher's classes.

    Args:
        known: the teacher's class names in the order of its logits; None if it has no names.
        class_map: the teacher's name or position (from 0) of classes of the data; all others have the same name.

    Raises:
        ValueError: a class has no position, two have the same one, or the map contains unknown classes.
    """
    class_map = class_map or {}
    if unknown := sorted(set(class_map) - set(classes)):
        raise ValueError(
            f"model.teacher.class_map names {some(unknown)}, which the data does not have."
            f"{did_you_mean(unknown[0], classes)} It is {{<class of the data>: <class of the teacher>}}."
        )
    place: dict[str | int, int] = {number: number for number in range(count)}
    place |= {name: number for number, name in enumerate(known or ())}
    wanted = {name: class_map.get(name, name) for name in classes}
    if unmatched := {name: target for name, target in wanted.items() if target not in place}:
        missing = some(f"{name!r} ({target!r})" for name, target in unmatched.items())
        names = f"such as {some(map(repr, known))}" if known else "which has no names for them"
        raise ValueError(
            f"the teacher has no class for {missing}; say which of its {count:,}, {names}, it is with "
            f"model.teacher.class_map={{{next(iter(unmatched))}:<its name, or its number from 0 on>}}."
        )
    places = [place[target] for target in wanted.values()]
    if len(set(places)) < len(places):
        twice = next(name for name, found in zip(classes, places, strict=True) if places.count(found) > 1)
        raise ValueError(
            f"{twice!r} and another class of the data are the same of the teacher's (model.teacher.class_map)."
        )
    return places


def read_class_names(file: str, option: str) -> list[str]:
    """Reads class names from a text file, one per line.

    Args:
        option: names the file, for the error message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file at {path}, which {option} names.")
    return [line for line in _read_text(path).splitlines() if line]


def read_class_map(path: Path) -> dict[str, str | int]:
    """Reads a class map: lines ``class of the data,class of the teacher``, by name or number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has another form.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file at {path}, which model.teacher.class_map names.")
    try:
        rows = [row for row in csv.reader(StringIO(_read_text(path))) if row]
    except csv.Error:  # an overlong cell
        rows = [[]]
    if any(len(row) != 2 or not all(row) for row in rows):
        raise ValueError(f"{path} has other lines than <class of the data>,<class of the teacher>, one a class.")
    return {name: int(target) if target.isdecimal() else target for name, target in rows}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without the mark that spreadsheets put first
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: save it in that encoding.") from error


def _shapes(name: str, num_classes: int) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in blueprint(name, num_classes).state_dict().items()}
