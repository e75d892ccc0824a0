"""Finds the data of a weights file, if the command does not name it: from its run, or else from the file."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rld_lightning.errors import UserError
from rld_lightning.hydra.options import CONF, list_options
from rld_lightning.hydra.quoting import for_hydra, read_text
from rld_lightning.runs.files import CONFIG, STUDENT, read_config, run_of, split_of, weights_in

_NAMED_AS_DATASET = ("cifar100", "digits", "imagenet")  # options with the name of their dataset that need no others
# The options that determine which images are evaluated and how they are read; the weights file holds the seed and the
# held-out share. Options that cause writing or downloading are not read: the run directory may be a stranger's.
_KEYS = ("root", "test_fraction", "image_size", "resize", "mean", "std", "decode", "num_workers", "eval_batch_size")
_UNPACKED = {"cifar100": "cifar-100-python", "imagenet": "val"}  # subfolders of a root that needs no download


def data_of(arguments: Sequence[str]) -> tuple[str, ...]:
    """Returns ``("data=imagefolder", "data.root=/photos", ...)`` for ``weights=`` of a run, if no data is named.

    Args:
        arguments: the command-line arguments of a script that evaluates weights.

    Raises:
        UserError: the run's data.root no longer exists, and the command does not name another.
    """
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("weights=")]
    if not given or any(re.match(r"\+*data=", argument) for argument in arguments):
        return ()
    path = Path(read_text(given[-1]).partition("::")[0]).expanduser()
    if path.is_dir():
        path = weights_in(path) or path / STUDENT
    has_root = any(argument.startswith("data.root=") for argument in arguments)
    return _data_of_run(run_of(path), has_root=has_root) or _data_of_file(path)


def _data_of_run(run: Path, *, has_root: bool) -> tuple[str, ...]:
    """Returns the data overrides of a run directory's config, if it is a run on data of this package."""
    try:
        data = read_config(run)["data"]
        option = {_target(name): name for name in list_options("data")}[data["_target_"]]
    except (OSError, ValueError, KeyError, TypeError):  # not a run directory
        return ()
    settings = {key: data[key] for key in _KEYS if data.get(key) is not None}
    if option in ("imagefolder", "shards") and data.get("name") is not None:  # others have their own
        settings["name"] = data["name"]
    if "split_file" in data and (written := split_of(run)) is not None:
        settings["split_file"] = str(written)
    if settings.get("decode") == "cuda":  # there may be no GPU here
        del settings["decode"]
    root = settings.get("root")
    if not isinstance(root, str) or has_root:
        settings.pop("root", None)
    elif option in _UNPACKED:
        if not (Path(root) / _UNPACKED[option]).is_dir():
            del settings["root"]
    elif "://" in root or "::" in root:
        raise UserError(
            f"{run} has its data in a store, {root}, which is not contacted for a run directory alone: if you trust "
            f"it, add data={option} data.root={root}."
        )
    elif not Path(root).is_dir():
        raise UserError(
            f"{run} was trained on data.root={root}, which is not a folder here; add data.root=<folder>, where these "
            "images are now."
        )
    return (f"data={option}", *(f"data.{key}={_override_value(run, key, value)}" for key, value in settings.items()))


def _target(option: str) -> str:
    return str(yaml.safe_load((CONF / "data" / f"{option}.yaml").read_text())["_target_"])


def _override_value(run: Path, key: str, value: Any) -> str:
    """Returns a plain value as an override's text; its range is checked later, with the rest of the command."""
    numbers = value if isinstance(value, list) else [value]
    if isinstance(value, str) and "${" not in value:
        return for_hydra(value)
    if not all(type(number) in (bool, int, float) for number in numbers):
        raise UserError(f"{run / CONFIG} says data.{key}={value!r}, which no run writes; name the data with data=.")
    return str(value).lower()


def _data_of_file(path: Path) -> tuple[str, ...]:
    """Returns the data override of an export's metadata, if its dataset needs no other options."""
    if path.suffix == ".ckpt":
        path = path.with_name(STUDENT)
    if path.suffix != ".safetensors" or not path.is_file():
        return ()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            name = (file.metadata() or {}).get("dataset")
    except (OSError, SafetensorError):  # the script reports it
        return ()
    return (f"data={name}",) if name in _NAMED_AS_DATASET else ()
