"""Which classes of the data are which of a model's: by name where its file names them, by position where not."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.errors import some
from rld_lightning.models.classes import class_order, reorder_classes
from rld_lightning.models.normalisation import Normalisation, make_renormalise, stored_normalisation
from rld_lightning.models.weights.beside import find_weights
from rld_lightning.models.weights.facts import WeightsFacts, facts_of
from rld_lightning.models.weights.read import Weights
from rld_lightning.models.weights.verify import create_fitting


class MatchedClasses(NamedTuple):
    """How the classes of the data and of a model belong together."""

    names: list[str]  # the model's classes, in the order of its logits
    class_of: list[int]  # for each class of the data, its place among them; -1 for one that the model does not know
    shared: int | None  # how many both know; None where these are all of both


def match_classes(facts: WeightsFacts, data: ImageDataModule) -> MatchedClasses:
    """Matches the classes of the data to those of a model, and says what does not match.

    Raises:
        ValueError: the file names its classes, and none of them, or another number, is in the data.
    """
    classes, known = list(data.class_names), facts.class_names
    by_position = MatchedClasses(classes, list(range(len(classes))), None)
    if known is None or known == classes:
        return by_position
    place = {name: position for position, name in enumerate(known)}
    shared = [name for name in classes if name in place]
    if not shared or len(place) != len(known):
        if len(known) != len(classes):
            raise ValueError(
                f"the model knows {len(known)} classes, such as {known[0]!r}, and none of the {len(classes)} of "
                f"{data.name} by its name; choose the data it was trained on with data=."
            )
        print_line("caution", f"the model knows other class names than {data.name}, such as {known[0]!r}")
        return by_position
    class_of = [place.get(name, -1) for name in classes]
    if len(shared) == len(known) == len(classes):
        print_line("model", f"its classes are matched to those of {data.name} by name, in another order")
        return MatchedClasses(known, class_of, None)
    unknown, absent = [name for name in classes if name not in place], sorted(set(known) - set(classes))
    parts = (
        (f"images of {len(unknown)} that it does not know are left out ({some(unknown)})", unknown),
        (f"{len(absent)} that it knows are not in the data, and compete all the same ({some(absent)})", absent),
    )
    said = "; ".join(text for text, names in parts if names)
    print_line("caution", f"measured on the {len(shared)} classes that model and {data.name} share by name; {said}")
    return MatchedClasses(known, class_of, len(shared))


def read_student(file: Path, name: str, data: ImageDataModule) -> nn.Module:
    """Reads a student for the images and classes of the data, with the normalisation that it was trained with.

    Args:
        name: of the network, where the file does not say it.

    Raises:
        WeightsError: the file cannot be used, or is another network's.
        ValueError: it knows other classes.
    """
    weights = find_weights(file)
    facts = facts_of(weights)
    name = facts.name or name
    network, weights = create_fitting(name, data.num_classes, weights)
    put_in_order(network, name, weights, data, "student")
    renormalise = make_renormalise(Normalisation(tuple(data.mean), tuple(data.std)), stored_normalisation(facts))
    return network if renormalise is None else nn.Sequential(renormalise, network)


def put_in_order(network: nn.Module, name: str, weights: Weights, data: ImageDataModule, role: str) -> None:
    """Puts the classes of a network in the order of the data, by name where its file names its own; tells of it.

    Args:
        role: what it is to be, ``"teacher"`` or ``"student"``.

    Raises:
        ValueError: it knows other classes.
    """
    if weights.account:
        print_line(role, f"weights {weights.account}")
    known, classes = facts_of(weights).class_names, list(data.class_names)
    if known is None or known == classes:
        return
    if (order := class_order(known, classes)) is None:
        raise ValueError(
            f"{weights.source} was trained on other classes than those of {data.name}{first_other(known, classes)}; "
            f"move it away, or name another file with model.{role}.weights=."
        )
    reorder_classes(network, name, order)
    print_line(role, f"its classes are matched to those of {data.name} by name{first_other(known, classes)}")


def first_other(known: list[str], classes: list[str]) -> str:
    """The first class that two lists do not have in the same place, in brackets; empty without one."""
    pairs = enumerate(zip(known, classes, strict=False))
    return next((f" (class {i} is {a!r} there and {b!r} here)" for i, (a, b) in pairs if a != b), "")
