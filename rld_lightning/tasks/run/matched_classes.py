"""Matches the classes of the data to a model's: by name if its file names them, otherwise by position."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.errors import some
from rld_lightning.models.classes import class_order, reorder_classes
from rld_lightning.models.normalisation import Normalisation, make_renormalise, stored_normalisation
from rld_lightning.models.weights.companion_files import find_weights
from rld_lightning.models.weights.facts import WeightsFacts, facts_of
from rld_lightning.models.weights.read import Weights
from rld_lightning.models.weights.verify import create_fitting


class MatchedClasses(NamedTuple):
    """The correspondence between the classes of the data and of a model."""

    names: list[str]  # the model's classes, in the order of its logits
    class_of: list[int]  # for each class of the data, its index among them; -1 if the model does not have it
    shared: int | None  # number of common classes; None if all are common


def match_classes(facts: WeightsFacts, data: ImageDataModule) -> MatchedClasses:
    """Matches the classes of the data to those of a model, and prints what does not match.

    Raises:
        ValueError: the file names its classes, and the data have none of them and another number of classes.
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
        (f"{len(absent)} that it knows are not in the data, and still compete ({some(absent)})", absent),
    )
    mismatches = "; ".join(text for text, names in parts if names)
    print_line(
        "caution", f"measured on the {len(shared)} classes that model and {data.name} share by name; {mismatches}"
    )
    return MatchedClasses(known, class_of, len(shared))


def read_student(file: Path, name: str, data: ImageDataModule) -> nn.Module:
    """Loads a student for the images and classes of the data, with the normalisation of its training.

    Args:
        name: the network's name, if the file does not contain it.

    Raises:
        WeightsError: the file cannot be used, or is another network's.
        ValueError: it has other classes.
    """
    weights = find_weights(file)
    facts = facts_of(weights)
    name = facts.name or name
    network, weights = create_fitting(name, data.num_classes, weights)
    reorder_to_data(network, name, weights, data, "student")
    renormalise = make_renormalise(Normalisation(tuple(data.mean), tuple(data.std)), stored_normalisation(facts))
    return network if renormalise is None else nn.Sequential(renormalise, network)


def reorder_to_data(network: nn.Module, name: str, weights: Weights, data: ImageDataModule, role: str) -> None:
    """Reorders the classes of a network as in the data, by name if its file names them; prints this.

    Args:
        role: ``"teacher"`` or ``"student"``.

    Raises:
        ValueError: it has other classes.
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
    """Returns the first class that differs between two lists, in brackets; empty if there is none."""
    pairs = enumerate(zip(known, classes, strict=False))
    return next((f" (class {i} is {a!r} there and {b!r} here)" for i, (a, b) in pairs if a != b), "")
