"""Checks whether weights fit a network, loads them if so, and explains the difference if not."""

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from rld_lightning.errors import some
from rld_lightning.models.factory import create_model, list_models
from rld_lightning.models.imported import is_external
from rld_lightning.models.input_size import split_size
from rld_lightning.models.taps import unwrap
from rld_lightning.models.weights.companion_files import find_weights
from rld_lightning.models.weights.read import Weights, WeightsError
from rld_lightning.models.weights.unpack import fitting

_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


def load_weights(model: nn.Module, source: str | os.PathLike[str] | Weights, *, name: str | None = None) -> Weights:
    """Loads the weights of a file into a model: all, or none on any mismatch; dtypes are converted.

    Args:
        model: the model to fill.
        source: a file, or the result of ``find_weights``. If it holds several state_dicts, the model's is loaded.
        name: the model's name in error messages; its class if not given.

    Returns:
        the loaded weights, with an account of what was used and what was not.

    Raises:
        FileNotFoundError: as for ``find_weights``.
        WeightsError: as for ``find_weights``, or the weights are another model's.
    """
    weights = _for_model(source if isinstance(source, Weights) else find_weights(source), model)
    verify_weights(model, weights, name=name)
    unwrap(model).load_state_dict(weights.state_dict)
    return weights


def check_fits(name: str, num_classes: int, weights: Weights) -> None:
    """Checks that weights fit a network before allocating it, since a tiny file may name a network of many gigabytes.

    Args:
        name: as for :func:`~rld_lightning.models.create_model`, which also lists the errors raised. External networks,
            which only the user can have named, are not checked here but when loading.

    Raises:
        WeightsError: they are another network's.
    """
    if is_external(split_size(name)[0]):
        return
    try:
        with torch.device("meta"):
            network = create_model(name, num_classes)
    except (NotImplementedError, RuntimeError, TypeError):  # some compute with tensors or NumPy in their constructors
        return
    verify_weights(network, _for_model(weights, network), name=name)


def create_fitting(name: str, num_classes: int, weights: Weights) -> tuple[nn.Module, Weights]:
    """Creates a network and loads weights into it, after :func:`check_fits`.

    Returns:
        the network, on the CPU, and the result of :func:`load_weights`.

    Raises:
        WeightsError: the weights are another network's.
    """
    check_fits(name, num_classes, weights)
    network = create_model(name, num_classes)
    return network, load_weights(network, weights, name=name)


def _for_model(weights: Weights, model: nn.Module) -> Weights:
    """Selects the state_dict with a model's keys and shapes from a file, and lists the rest in the account."""
    shapes = _shapes(unwrap(model).state_dict())
    spare = () if any(key.startswith(_AUXILIARY) for key in shapes) else _AUXILIARY
    places = list(fitting(list(weights.parts), shapes, spare))
    if not places:
        return replace(weights, state_dict=_without_auxiliary(weights.state_dict, shapes))
    place, part = places[0]
    others = [other for other, _ in places[1:]]
    whole = next(found.state_dict for found in weights.parts if found.path == part.path)
    prefix = place.removeprefix(part.path).removeprefix(".")
    unused = [key for key in whole if prefix and not key.startswith(f"{prefix}.")]
    unused += [found.path for found in weights.parts if found.path not in (part.path, *others)]
    unused += weights.other_entries
    account = f"taken from {place!r}" if place else ""
    if others:
        account += f", not from {some(map(repr, others))}: for those write {weights.source.name}::{others[0]}"
    if unused:
        account += f"{'; ' if account else ''}left: {some(unused)}"
    return replace(weights, state_dict=_without_auxiliary(part.state_dict, shapes), account=account)


def _without_auxiliary(state_dict: dict[str, Tensor], wanted: Container[str]) -> dict[str, Tensor]:
    """Removes torchvision's auxiliary classifiers, which are used only in training, if the model has none."""
    return {key: v for key, v in state_dict.items() if key in wanted or not key.startswith(_AUXILIARY)}


def verify_weights(model: nn.Module, weights: Weights, *, name: str | None = None) -> None:
    """Checks that weights have a model's keys and shapes.

    Args:
        name: the model's name in error messages; its class if not given.

    Raises:
        WeightsError: they differ; the message explains how.
    """
    model = unwrap(model)
    own = model.state_dict()
    actual = _shapes(weights.state_dict)
    # torch fills in BatchNorm's counters if they are absent, as in files from before torch 0.4.1.
    expected = {key: s for key, s in _shapes(own).items() if key in actual or not _is_counter(key)}
    if expected == actual:
        if lost := [key for key, value in weights.state_dict.items() if value.is_complex() > own[key].is_complex()]:
            raise WeightsError(f"{weights.source} has complex numbers in {some(lost)}, and the model has real ones")
        return
    target = f"the model {name or type(model).__name__}"
    if (widths := _classifier_widths(expected, actual)) is not None:
        raise WeightsError(
            f"{weights.source} does not fit {target}: the file has {widths[1]} classes, the model {widths[0]}; "
            f"use weights trained on the same classes, or build the model with num_classes={widths[1]}"
        )
    shape_differs = [key for key in expected.keys() & actual.keys() if expected[key] != actual[key]]
    differences = {
        "missing from the file": [f"{key} {list(expected[key])}" for key in expected if key not in actual],
        "not in the model": [f"{key} {list(actual[key])}" for key in actual if key not in expected],
        "of another shape": [
            f"{key} (file {list(actual[key])}, model {list(expected[key])})" for key in expected if key in shape_differs
        ],
    }
    details = "; ".join(f"{len(items)} {what}: {some(items)}" for what, items in differences.items() if items)
    candidates = identify(weights.state_dict)
    advice = (
        f"the file looks like {' or '.join(candidates)}: choose that model, or another file"
        if candidates
        else "the file matches no known model: check that it belongs to this architecture"
    )
    raise WeightsError(f"{weights.source} does not fit {target} ({details}); {advice}")


def identify(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Names the models whose keys and shapes match ``state_dict``, ignoring the number of classes.

    Candidates are the registered models and torchvision's ResNets.
    """
    actual = {key: shape for key, shape in _shapes(state_dict).items() if not _is_counter(key)}
    return [
        name
        for name, expected in _signatures().items()
        if expected.keys() == actual.keys() and all(_fits(expected[key], actual[key]) for key in expected)
    ]


@cache
def _signatures() -> dict[str, dict[str, tuple[int | None, ...]]]:
    """Returns every known model's shapes, with ``None`` for dimensions that depend on the number of classes."""
    signatures = {}
    with torch.device("meta"):
        for name in (*list_models(), *list_models("torchvision/resnet*")):
            few, many = (_shapes(create_model(name, num_classes=classes).state_dict()) for classes in (2, 3))
            signatures[name] = {
                key: tuple(a if a == b else None for a, b in zip(few[key], many[key], strict=True))
                for key in few
                if not _is_counter(key)
            }
    return signatures


def _fits(expected: Sequence[int | None], actual: Sequence[int]) -> bool:
    return len(expected) == len(actual) and all(a in (None, b) for a, b in zip(expected, actual, strict=True))


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _classifier_widths(
    expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]]
) -> tuple[int, int] | None:
    """Returns the (expected, actual) numbers of outputs if the two differ only in one layer's outputs."""
    if expected.keys() != actual.keys():
        return None
    differing = [key for key in expected if expected[key] != actual[key]]
    widths = {(expected[key][:1], actual[key][:1]) for key in differing}
    same_layer = len({key.rpartition(".")[0] for key in differing}) == 1
    same_inputs = all(expected[key][1:] == actual[key][1:] for key in differing)
    if not (same_layer and same_inputs and len(widths) == 1):
        return None
    ((model_width, file_width),) = widths
    return (model_width[0], file_width[0]) if model_width and file_width else None
