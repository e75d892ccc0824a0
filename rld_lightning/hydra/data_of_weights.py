"""Which data a file of weights is for, where the command does not say: its run does, or else the file."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rld_lightning.errors import UserError
from rld_lightning.hydra.options import CONF, list_options
from rld_lightning.hydra.quoting import for_hydra, read_text
from rld_lightning.runs.files import CONFIG, STUDENT, read_config, run_of, split_of, weights_in

_COMPLETE = ("cifar100", "digits", "imagenet")  # options that need nothing else, called as their data set
# What decides which images are measured, and how they are read; seed and share held out are in the file itself. Where
# a folder, maybe a stranger's, would have something written or fetched is not asked.
_SEEN = ("root", "test_fraction", "image_size", "resize", "mean", "std", "decode", "num_workers", "eval_batch_size")
_UNPACKED = {"cifar100": "cifar-100-python", "imagenet": "val"}  # in their root, where nothing has to be fetched for it


def data_of(arguments: Sequence[str]) -> tuple[str, ...]:
    """``("data=imagefolder", "data.root=/photos", ...)`` where ``weights=`` is of a run on it, and no data are named.

    Args:
        arguments: what stands behind the name of a script that measures weights.

    Raises:
        UserError: the run's images are not where they were, and the command does not say where else.
    """
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("weights=")]
    if not given or any(re.match(r"\+*data=", argument) for argument in arguments):
        return ()
    path = Path(read_text(given[-1]).partition("::")[0]).expanduser()
    if path.is_dir():
        path = weights_in(path) or path / STUDENT
    has_root = any(argument.startswith("data.root=") for argument in arguments)
    return _of_run(run_of(path), has_root=has_root) or _of_file(path)


def _of_run(run: Path, *, has_root: bool) -> tuple[str, ...]:
    """What the configuration in a folder says, if it is that of a run on data of this package."""
    try:
        data = read_config(run)["data"]
        option = {_target(name): name for name in list_options("data")}[data["_target_"]]
    except (OSError, ValueError, KeyError, TypeError):  # the folder of something else
        return ()
    settings = {key: data[key] for key in _SEEN if data.get(key) is not None}
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
    return (f"data={option}", *(f"data.{key}={_text(run, key, value)}" for key, value in settings.items()))


def _target(option: str) -> str:
    return str(yaml.safe_load((CONF / "data" / f"{option}.yaml").read_text())["_target_"])


def _text(run: Path, key: str, value: Any) -> str:
    """A plain value as Hydra reads it; that it is one that the option takes is checked with the rest of a command."""
    numbers = value if isinstance(value, list) else [value]
    if isinstance(value, str) and "${" not in value:
        return for_hydra(value)
    if not all(type(number) in (bool, int, float) for number in numbers):
        raise UserError(f"{run / CONFIG} says data.{key}={value!r}, which no run writes; name the data with data=.")
    return str(value).lower()


def _of_file(path: Path) -> tuple[str, ...]:
    """What an export says by itself, where that is all there is to say."""
    if path.suffix == ".ckpt":
        path = path.with_name(STUDENT)
    if path.suffix != ".safetensors" or not path.is_file():
        return ()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            name = (file.metadata() or {}).get("dataset")
    except (OSError, SafetensorError):  # which the script says by itself
        return ()
    return (f"data={name}",) if name in _COMPLETE else ()
