"""Do weights belong to a network? They are loaded where they do, and the difference is explained where not."""

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from rld_lightning.errors import some
from rld_lightning.models.factory import create_model, list_models
from rld_lightning.models.imported import is_from_elsewhere
from rld_lightning.models.input_size import split_size
from rld_lightning.models.taps import unwrap
from rld_lightning.models.weights.beside import find_weights
from rld_lightning.models.weights.read import Weights, WeightsError
from rld_lightning.models.weights.unpack import fitting

_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


def load_weights(model: nn.Module, source: str | os.PathLike[str] | Weights, *, name: str | None = None) -> Weights:
    """Loads the weights of a file into a model: all or, on any mismatch, none; dtypes are converted.

    Args:
        model: the model to fill.
        source: a file, or what ``find_weights`` made of one. Of several state_dicts in it, the model's is taken.
        name: what error messages call the model; its class if not given.

    Returns:
        the loaded weights, with an account of what was used and what was left out.

    Raises:
        FileNotFoundError: as ``find_weights``.
        WeightsError: as ``find_weights``, or the weights are another model's.
    """
    weights = _for_model(source if isinstance(source, Weights) else find_weights(source), model)
    verify_weights(model, weights, name=name)
    unwrap(model).load_state_dict(weights.state_dict)
    return weights


def check_fits(name: str, num_classes: int, weights: Weights) -> None:
    """Looks whether weights are a network's before there is one: a file of some bytes may name one of many gigabytes.

    Args:
        name: as for :func:`~rld_lightning.models.create_model`, and what that raises. A network from elsewhere, which
            only the user can have named, is looked at once it is there.

    Raises:
        WeightsError: they are another network's.
    """
    if is_from_elsewhere(split_size(name)[0]):
        return
    try:
        with torch.device("meta"):
            network = create_model(name, num_classes)
    except (NotImplementedError, RuntimeError, TypeError):  # some compute with tensors, or NumPy, while they are made
        return
    verify_weights(network, _for_model(weights, network), name=name)


def create_fitting(name: str, num_classes: int, weights: Weights) -> tuple[nn.Module, Weights]:
    """A network with weights that were read from a file, which are looked at first, as :func:`check_fits` does.

    Returns:
        the network, on the CPU, and what :func:`load_weights` says of them.

    Raises:
        WeightsError: they are another network's.
    """
    check_fits(name, num_classes, weights)
    network = create_model(name, num_classes)
    return network, load_weights(network, weights, name=name)


def _for_model(weights: Weights, model: nn.Module) -> Weights:
    """Takes from a file what has the keys and shapes of a model, wherever it lies, and accounts for the rest."""
    shapes = _shapes(unwrap(model).state_dict())
    spare = () if any(key.startswith(_AUXILIARY) for key in shapes) else _AUXILIARY
    places = list(fitting(list(weights.parts), shapes, spare))
    if not places:
        return replace(weights, state_dict=_without_auxiliary(weights.state_dict, shapes))
    place, part = places[0]
    others = [other for other, _ in places[1:]]
    whole = next(found.state_dict for found in weights.parts if found.path == part.path)
    prefix = place.removeprefix(part.path).removeprefix(".")
    left = [key for key in whole if prefix and not key.startswith(f"{prefix}.")]
    left += [found.path for found in weights.parts if found.path not in (part.path, *others)]
    left += weights.beside
    account = f"taken from {place!r}" if place else ""
    if others:
        account += f", not from {some(map(repr, others))}: for those write {weights.source.name}::{others[0]}"
    if left:
        account += f"{'; ' if account else ''}left: {some(left)}"
    return replace(weights, state_dict=_without_auxiliary(part.state_dict, shapes), account=account)


def _without_auxiliary(state_dict: dict[str, Tensor], wanted: Container[str]) -> dict[str, Tensor]:
    """Leaves out torchvision's auxiliary classifiers, which serve training alone, where the model has none."""
    return {key: v for key, v in state_dict.items() if key in wanted or not key.startswith(_AUXILIARY)}


def verify_weights(model: nn.Module, weights: Weights, *, name: str | None = None) -> None:
    """Checks that weights have a model's keys and shapes.

    Args:
        name: what error messages call the model; its class if not given.

    Raises:
        WeightsError: they have not; the message explains the difference.
    """
    model = unwrap(model)
    found = _shapes(weights.state_dict)
    # torch fills in BatchNorm's counters where they are absent, as they are from files made before torch 0.4.1.
    expected = {key: s for key, s in _shapes(model.state_dict()).items() if key in found or not _is_counter(key)}
    if expected == found:
        return
    target = f"the model {name or type(model).__name__}"
    if (widths := _classifier_widths(expected, found)) is not None:
        raise WeightsError(
            f"{weights.source} does not fit {target}: the file has {widths[1]} classes, the model {widths[0]}; "
            f"use weights trained on the same classes, or build the model with num_classes={widths[1]}"
        )
    shape_differs = [key for key in expected.keys() & found.keys() if expected[key] != found[key]]
    differences = {
        "missing from the file": [f"{key} {list(expected[key])}" for key in expected if key not in found],
        "not in the model": [f"{key} {list(found[key])}" for key in found if key not in expected],
        "of another shape": [
            f"{key} (file {list(found[key])}, model {list(expected[key])})" for key in expected if key in shape_differs
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
    """Names the models whose keys and shapes are those of ``state_dict``, the number of classes aside.

    Candidates are the registered models and torchvision's ResNets.
    """
    found = {key: shape for key, shape in _shapes(state_dict).items() if not _is_counter(key)}
    return [
        name
        for name, expected in _signatures().items()
        if expected.keys() == found.keys() and all(_fits(expected[key], found[key]) for key in expected)
    ]


@cache
def _signatures() -> dict[str, dict[str, tuple[int | None, ...]]]:
    """Every known model's shapes, with ``None`` for the dimensions that depend on the number of classes."""
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


def _fits(expected: Sequence[int | None], found: Sequence[int]) -> bool:
    return len(expected) == len(found) and all(a in (None, b) for a, b in zip(expected, found, strict=True))


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _classifier_widths(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> tuple[int, int] | None:
    """The (expected, found) numbers of outputs if one layer differs, and only in that."""
    if expected.keys() != found.keys():
        return None
    differing = [key for key in expected if expected[key] != found[key]]
    widths = {(expected[key][:1], found[key][:1]) for key in differing}
    same_layer = len({key.rpartition(".")[0] for key in differing}) == 1
    same_inputs = all(expected[key][1:] == found[key][1:] for key in differing)
    if not (same_layer and same_inputs and len(widths) == 1):
        return None
    ((model_width, file_width),) = widths
    return (model_width[0], file_width[0]) if model_width and file_width else None
