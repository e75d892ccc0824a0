"""Which data a file of weights is for, where the command does not say: the file may."""

import re
from collections.abc import Sequence
from pathlib import Path

from rld_lightning.hydra.quoting import read_text
from rld_lightning.runs.files import STUDENT

_COMPLETE = ("cifar100", "digits", "imagenet")  # options that need nothing else, called as their data set
_EXPORTED = (STUDENT, "model.safetensors")  # in the folder of a run, and of an export


def data_of(arguments: Sequence[str]) -> tuple[str, ...]:
    """``("data=digits",)`` where ``weights=`` names a run, or an export, on it, and the command names no data.

    Args:
        arguments: what stands behind the name of a script that measures weights.
    """
    if any(re.match(r"\+*data=", argument) for argument in arguments):
        return ()
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("weights=")]
    path = Path(read_text(given[-1]).partition("::")[0]).expanduser() if given else Path()
    if path.is_dir():
        path = next((path / name for name in _EXPORTED if (path / name).is_file()), path)
    elif path.suffix == ".ckpt":
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
