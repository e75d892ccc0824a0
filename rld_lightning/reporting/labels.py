"""Short labels of the settings that distinguish runs: ``alpha=2, lr=0.1``."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import isnan

from rld_lightning.runs.naming import class_name


def distinguishing(settings: Sequence[Mapping[str, str]], known: Sequence[Hashable] = ()) -> list[str]:
    """The keys that distinguish all settings, the loss's first, without those that add no distinction.

    ``data.subset`` is always included if it differs: accuracies with fewer training images would mislead without it.

    Args:
        known: for each of the settings, what the reader already knows to be different.
    """
    classes: list[Hashable] = list(known) or [0] * len(settings)
    keys = []
    for key in differing(settings):
        refined: list[Hashable] = list(zip(classes, (values.get(key) for values in settings), strict=True))
        if len(set(refined)) > len(set(classes)) or key == "data.subset":
            keys.append(key)
            classes = refined
    return keys


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys in which some settings differ, ordered: the loss's, the recipe's, the data's, then the others."""
    prefixes = ("loss", "recipe.epochs", "recipe.optimizer", "recipe", "data", "model", "trainer")

    def order(key: str) -> tuple[bool, int, str]:  # a loss's warm-up comes last: it depends on the recipe
        return (
            key.endswith("warmup_epochs"),
            next((i for i, r in enumerate(prefixes) if key.startswith(r)), len(prefixes)),
            key,
        )

    keys = {key for values in settings for key in values}
    return sorted((key for key in keys if len({values.get(key) for values in settings}) > 1), key=order)


def describe(settings: Mapping[str, str], keys: Iterable[str]) -> str:
    """``alpha=2, lr=0.1``, without ``callbacks=None`` (no callback affects training)."""
    shown = [key for key in dict.fromkeys(keys) if key in settings and (key, settings[key]) != ("callbacks", "None")]
    return ", ".join(f"{short_key(key)}={short_value(settings[key])}" for key in shown)


def short_key(key: str) -> str:
    """``alpha`` for ``loss.alpha``; the last two parts if the last is ambiguous."""
    *parents, name = key.split(".")
    if name in ("_target_", "weights", "name", "channels_last") and parents:
        return parents[-1] if name == "_target_" else f"{parents[-1]} {name}".replace("_", " ")
    return name


def short_value(value: object) -> str:
    """``4`` for 4.0, ``0.3333`` for 1/3, ``SGD`` for ``torch.optim.SGD``, the end of a path (also from text)."""
    value = str(value)
    try:
        number = float(value)
        return str(int(number)) if number.is_integer() and abs(number) < 1e15 else f"{number:.4g}"
    except ValueError:
        pass
    if "/" in value:
        return "/".join(value.split("/")[-3:])
    if re.fullmatch(r"[a-z_]\w*(\.\w+)+", value):
        return class_name(value)
    return value if len(value) <= 40 else f"{value[:37]}..."


def shortened(name: str, most: int) -> str:
    """A name cut to a number of characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def mean_and_std(mean: float, std: float | None) -> str:
    """``60.12 ± 0.34``, or only the mean if the deviation is unknown."""
    return f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None and not isnan(std) else "")


def in_markdown(value: object) -> str:
    """A value for Markdown on one line, with HTML tags and links disabled: names in runs are untrusted."""
    line = re.sub(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+", " ", str(value))  # a heading could follow
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line).replace("](", "] (")
