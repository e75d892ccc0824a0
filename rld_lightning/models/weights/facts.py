"""The metadata of a weights file, read as plain numbers and texts within their ranges.

The file's author is not trusted: nothing is instantiated, resolved as an interpolation or used as a path.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rld_lightning.limits import (
    LARGEST_NUMBER,
    LARGEST_RESIZE,
    LARGEST_SIDE,
    LONGEST_TEXT,
    MOST_CLASSES,
    SEEDS,
    is_encodable,
    is_line,
    is_number,
    is_spread,
    is_three,
    is_whole,
)
from rld_lightning.models.weights.read import Weights, WeightsError

_MOST_SHOWN = 60  # characters of a refused value
INTERPOLATIONS = ("bilinear", "bicubic")

# Keys that decide which images a network is evaluated on, and for how many classes it is built. All others are only
# compared or shown; if their text is not JSON, as in checkpoints of other programs, it is ignored.
_STRICT = ("num_classes", "data_seed", "val_fraction", "test_fraction")


@dataclass(frozen=True)
class WeightsFacts:
    """The metadata of a weights file; None for what it does not state."""

    name: str | None = None  # the model's name, for `create_model`
    dataset: str | None = None  # the data set that it was trained on
    source: str | None = None  # its origin, such as `"fit"` or `"published"`
    url: str | None = None  # where it was downloaded from
    num_classes: int | None = None  # C, at least 2
    class_names: list[str] | None = None  # the classes, in the order of the logits
    image_shape: tuple[int, int, int] | None = None  # (channels, height, width) of the images
    mean: tuple[float, float, float] | None = None  # mean of each channel of the images, for values in [0, 1]
    std: tuple[float, float, float] | None = None  # standard deviation of each channel, for the same values
    resize: int | None = None  # length of an image's shorter side in pixels, before the centre crop
    interpolation: str | None = None  # of the resizing, `"bilinear"` or `"bicubic"`
    data_seed: int | None = None  # seed of the held-out split, in [0, 2**32)
    val_fraction: float | None = None  # share of the training split that was held out, in [0, 1)
    # Share held out for testing, in [0, 1), of a folder without a test split
    test_fraction: float | None = None
    top1: float | None = None  # accuracy in percent
    epochs: int | None = None  # number of training epochs


def facts_of(weights: Weights) -> WeightsFacts:
    """Reads the facts of a weights file.

    Raises:
        WeightsError: a value has the wrong type or is out of range; the message names file, key and value.
    """
    return read_facts(weights.metadata, weights.source)


def read_facts(metadata: Mapping[str, str], source: str | Path) -> WeightsFacts:
    """Reads the facts in the header of a safetensors file or in the hyper-parameters of a checkpoint.

    Args:
        metadata: texts; numbers and lists are JSON. In checkpoints the key of the name is ``student``.

    Raises:
        WeightsError: as :func:`facts_of`.
    """
    values = dict(metadata)
    if "name" not in values and "student" in values:
        values["name"] = values["student"]
    return WeightsFacts(
        **{field.name: _read(field.name, values.get(field.name), source) for field in fields(WeightsFacts)}
    )


def _read(key: str, text: str | None, source: str | Path) -> Any:
    if text is None:
        return None
    accepts, kind = _KINDS[key]
    if kind is _TEXT or key == "interpolation":
        if not accepts(text):
            raise _refusal(key, text, kind, source)
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if text == "None" or key not in _STRICT:
            return None
        raise _refusal(key, text, kind, source) from None
    if value is None:
        return None
    if not accepts(value):
        raise _refusal(key, text, kind, source)
    return tuple(value) if kind in (_SHAPE, _CHANNELS, _SPREADS) else value


def _refusal(key: str, text: str, kind: str, source: str | Path) -> WeightsError:
    shown = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
    return WeightsError(
        f"{source} says {key}={shown!r} about itself, which is not {kind}; save its state_dict alone in another "
        "file to use the weights without what this one says"
    )


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


_TEXT = f"a line of at most {LONGEST_TEXT} characters"
_SHAPE = f"a list of three whole numbers from 1 to {LARGEST_SIDE}"
_CHANNELS = "a list of three numbers"
_SPREADS = "a list of three numbers above 0"

_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (is_line, _TEXT),
    "dataset": (is_line, _TEXT),
    "source": (is_line, _TEXT),
    "url": (is_line, _TEXT),
    "num_classes": (is_whole(2, MOST_CLASSES), "a whole number >= 2"),
    "class_names": (lambda value: isinstance(value, list) and all(map(is_encodable, value)), "a list of names"),
    "image_shape": (is_three(is_whole(1, LARGEST_SIDE + 1)), _SHAPE),
    "mean": (is_three(is_number), _CHANNELS),
    "std": (is_three(is_spread), _SPREADS),
    "resize": (is_whole(1, LARGEST_RESIZE + 1), f"a whole number from 1 to {LARGEST_RESIZE}"),
    "interpolation": (lambda value: value in INTERPOLATIONS, " or ".join(INTERPOLATIONS)),
    "data_seed": (is_whole(0, SEEDS), "a whole number in [0, 2**32)"),
    "val_fraction": (_is_share, "a number in [0, 1)"),
    "test_fraction": (_is_share, "a number in [0, 1)"),
    "top1": (lambda value: is_number(value) and 0 <= value <= 100, "a number in [0, 100]"),
    "epochs": (is_whole(0, LARGEST_NUMBER), "a whole number from 0 on"),
}
