"""Whether a network, a file of weights and the data belong together, and one sentence where they do not."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from rld_lightning.data.base import ImageDataModule
from rld_lightning.models.factory import create_model
from rld_lightning.models.facts import facts_of
from rld_lightning.models.read import Weights
from rld_lightning.models.taps import evaluation_mode


def check_network(name: str, data: ImageDataModule, settings: DictConfig, network: nn.Module | None = None) -> None:
    """Has a network show that it turns two images of the data into logits.

    Args:
        name: the model's name.
        data: the data, set up.
        settings: their configuration, which says whether the image size can be chosen.
        network: the network, on the CPU; by default a fresh one of this name.

    Raises:
        ValueError: it cannot take them, or what it returns are not logits ``(2, C)``.
    """
    network = create_model(name, data.num_classes) if network is None else network
    shape = "x".join(map(str, data.image_shape))
    try:
        with evaluation_mode(network), torch.no_grad():
            logits = network(torch.zeros(2, *data.image_shape))
    except Exception as error:  # each library refuses images in its own way
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        size = "another size with data.image_size=, or " if "image_size" in settings else ""
        raise ValueError(f"{name} cannot take images of {shape} ({reason}); choose {size}another model.") from error
    found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if found != (2, data.num_classes):
        raise ValueError(
            f"{name} makes {found} of two images of {shape}, not logits {(2, data.num_classes)}; choose another model."
        )


def check_classes(weights: Weights, data: ImageDataModule, way_out: str) -> None:
    """Refuses weights of other classes, where their file names its own.

    Args:
        weights: the weights and what their file says about them.
        data: the data, set up.
        way_out: what the user can do, to end the sentence.

    Raises:
        ValueError: the classes are others, or in another order.
    """
    known, classes = facts_of(weights).class_names, list(data.class_names)
    if known is not None and known != classes:
        raise ValueError(
            f"{weights.source} was trained on other classes than those of {data.name}{_first_other(known, classes)}; "
            f"{way_out}."
        )


def split_to_measure(settings: DictConfig, weights: Weights) -> dict[str, Any]:
    """What the run of a file has held out, for the options of the data that their configuration leaves open (null).

    Args:
        settings: the data's part of the configuration.
        weights: the weights and what their file says about them.

    Returns:
        values by option, such as ``{"seed": 0, "val_fraction": 0.1}``; 0 where the file does not say.

    Raises:
        WeightsError: what the file says is not a number in range.
    """
    facts = facts_of(weights)
    options = {option: getattr(facts, name) or 0 for name, option in ImageDataModule.split_options.items()}
    return {option: value for option, value in options.items() if settings[option] is None}


def check_split(weights: Weights, data: ImageDataModule, split: str) -> None:
    """Refuses to measure weights on images that they were trained on, as far as their file says what was held out.

    Args:
        weights: the weights and what their file says about them.
        data: the data.
        split: ``"test"`` or ``"val"``.

    Raises:
        ValueError: other images were held out when they were trained.
    """
    facts = facts_of(weights)
    if facts.dataset != data.name:
        return
    # How the training split is cut up does not change the test split; and where nothing is cut off, no seed counts.
    harmless = ImageDataModule.split_options if split == "test" else () if data.val_fraction else ("data_seed",)
    for name, value in data.split_facts.items():
        known, option = getattr(facts, name), f"data.{data.split_options[name]}"
        if name not in harmless and known not in (None, value):
            raise ValueError(
                f"{weights.source} was trained with {option}={known}, and with {option}={value} it would be measured "
                f"on images that it was trained on; add {option}={known}."
            )


def _first_other(known: list[str], classes: list[str]) -> str:
    pairs = enumerate(zip(known, classes, strict=False))
    return next((f" (class {i} is {a!r} there and {b!r} here)" for i, (a, b) in pairs if a != b), "")
