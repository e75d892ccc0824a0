"""Rebuilds a run's data and losses from its settings.

The run directory may be untrusted, so its settings are treated as data: only classes of this package are built, from
a list, and the settings cannot make anything be downloaded from elsewhere or written to.
"""

import inspect
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import rld_lightning.data
from rld_lightning.data import ImageDataModule, ImageNetDataModule
from rld_lightning.losses import CombinedLoss, DistillationLoss
from rld_lightning.losses.registry import list_losses, loss_class
from rld_lightning.runs.files import split_of
from rld_lightning.runs.finished import Run

# Paths and URLs of data, which a run directory must not decide.
_PLACES = ("download", "url", "cache", "storage_options", "bad_images_file", "split_file")


def build_data(run: Run, root: Path | None = None, *, option: str = "--data ") -> ImageDataModule:
    """Builds a run's data module, without loading the data.

    Args:
        root: where the data are, if not where they were during training. Data are downloaded only to there.

    Raises:
        FileNotFoundError: the run's own data path does not exist, or must be unpacked first.
        ValueError: the settings name a class from elsewhere, or contain invalid values.
    """
    classes = _data_classes(run.config["data"].get("_target_"))
    own = [cls for cls in classes if issubclass(cls, ImageDataModule) and not inspect.isabstract(cls)]
    settings = {key: value for key, value in run.config["data"].items() if key not in _PLACES}
    if "split_file" in run.config["data"] and (written := split_of(run.folder)) is not None:
        settings["split_file"] = str(written)
    place = settings.get("root")
    if root is not None and place is not None:
        settings["root"] = str(root)
    elif isinstance(place, str) and ("://" in place or "::" in place):
        raise ValueError(
            f"{run.folder} has its data in a store, {place}, which is not contacted for a run directory alone; give "
            f"another place with {option}<folder>."
        )
    elif str(settings.get("_target_")).endswith(".CIFAR100DataModule"):
        settings["download"] = False
    elif isinstance(place, str) and not Path(place).is_dir():
        raise FileNotFoundError(
            f"{run.folder} was trained on the data in {place}, which is not a folder here; say where they are now with "
            f"{option}<folder>."
        )
    if settings.get("decode") == "cuda":  # there may be no GPU here
        settings["decode"] = "auto"
    built = _build(settings, _targets(own, "rld_lightning.data"), run.folder)
    if root is None and isinstance(built, ImageNetDataModule) and not (built.root / "val").is_dir():
        raise FileNotFoundError(f"there is no val/ in {built.root}; give the data's folder with {option}<folder>.")
    return built


def build_loss(run: Run, settings: Mapping[str, Any] | None = None) -> DistillationLoss:
    """Builds a run's loss.

    Raises:
        ValueError: the settings name a class from elsewhere, or contain invalid values.
    """
    own = [*map(loss_class, list_losses()), CombinedLoss]
    allowed = _targets(own, "rld_lightning.losses") | _targets(own, "rld_lightning.losses.features")
    return _build(run.config["loss"] if settings is None else settings, allowed, run.folder)


def _data_classes(target: object) -> list[type]:
    """Returns the public classes of ``rld_lightning.data``, and those of data sets that are single modules there."""
    data = rld_lightning.data
    module, _, name = str(target).rpartition(".")
    added = None
    if module in {found.name for found in pkgutil.iter_modules(data.__path__, f"{data.__name__}.")}:
        added = getattr(import_module(module), name, None)
    own = [added] if isinstance(added, type) and added.__module__ == module else []
    return [*(getattr(data, name) for name in data.__all__), *own]


def _targets(classes: list[type], package: str) -> dict[str, type]:
    """Maps the import paths that configurations use to classes."""
    return {f"{home}.{cls.__name__}": cls for cls in classes for home in (package, cls.__module__)}


def _build(settings: Mapping[str, Any], allowed: Mapping[str, type], folder: Path) -> Any:
    target = settings.get("_target_")
    cls = allowed.get(target) if isinstance(target, str) else None
    if cls is None:
        raise ValueError(
            f"{folder} is not read: its settings name {target!r}, which is not one of this package's data sets or "
            "losses; nothing was run."
        )
    plain = {key: value for key, value in settings.items() if key not in ("_target_", "_convert_")}
    try:
        return cls(**_value(plain, allowed, folder))
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{folder} does not fit this version: {cls.__name__} cannot be built from it ({error})."
        ) from error


def _value(value: object, allowed: Mapping[str, type], folder: Path) -> Any:
    """Returns a plain value, or the allowed object that it describes."""
    if isinstance(value, dict):
        if "_target_" in value:
            return _build(value, allowed, folder)
        if special := [key for key in value if not isinstance(key, str) or key.startswith("_")]:
            raise ValueError(f"{folder} is not read: its settings have the key {special[0]!r}, which no run writes.")
        return {key: _value(inner, allowed, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_value(inner, allowed, folder) for inner in value]
    if (value is not None and not isinstance(value, bool | int | float | str)) or "${" in str(value):
        raise ValueError(f"{folder} is not read: its settings have {value!r}, which is not a plain value.")
    return value
