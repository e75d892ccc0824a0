"""Values on a command line: written as shell and Hydra have to have them, and mended where only the shell was told."""

import re
import shlex
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

# Keys whose values are files, folders or addresses; Hydra's own for the folders of runs and sweeps.
PATHS = frozenset(
    (
        *("paths.data", "paths.runs", "paths.teachers", "paths.run"),
        *("data.root", "data.cache", "data.bad_images_file", "data.split_file"),
        *("model.teacher.weights", "model.teacher.start", "model.student.weights"),
        *("resume", "weights", "out", "index.train", "index.test", "index.val", "index.class_names"),
        *("hydra.run.dir", "hydra.sweep.dir"),
    )
)

_UNREADABLE = object()


def as_argument(key: str, value: Any) -> str:
    """An option of a command as it can be pasted into a shell: ``"resume='runs/a=1/last.ckpt'"``."""
    return _for_shell(f"{key}={for_hydra(str(value))}")


def as_command(arguments: Iterable[str]) -> str:
    """Arguments that Hydra reads, as they can be pasted into a shell."""
    return " ".join(map(_for_shell, arguments))


def _for_shell(argument: str) -> str:
    # Easier to read than shlex's '"'"', where the shell leaves all signs alone.
    return f'"{argument}"' if "'" in argument and not set(argument) & set('"$`\\!') else shlex.quote(argument)


def for_hydra(text: str) -> str:
    """A text as Hydra's grammar has to have it: in quotes where it would be taken for something else."""
    if _read(text) == text and not text.startswith("'") and "${" not in text:
        return text
    # Hydra takes a backslash for an escape in front of a quote alone.
    inner = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", r"\'"), text)
    return "'" + inner.replace("${", r"\${") + "'"


def with_quotes(arguments: Iterable[str]) -> list[str]:
    """Puts in the quotes that Hydra needs and no shell passes on, where a value can only be a path.

    That is where Hydra cannot read ``key=value``, or would read something else than one text, and the key is one of
    :data:`PATHS`, or there is such a file: ``weights=runs/seed=1/student.safetensors``. A list of them with commas
    between is taken for several paths if each is there.
    """
    return [_with_quotes(argument) for argument in arguments]


def read_text(value: str) -> str:
    """What a value on a command line is as a text, with or without Hydra's quotes."""
    read = _read(value)
    return read if isinstance(read, str) else value


def _with_quotes(argument: str) -> str:
    key, equals, value = argument.partition("=")
    read = _read(value)
    if not equals or not value or argument.startswith("-") or read is None or isinstance(read, str):
        return argument
    parts = value.split(",")
    if len(parts) > 1 and all(map(_exists, parts)):
        return f"{key}={','.join(map(_quoted, parts))}"
    is_a_list = read is not _UNREADABLE  # which a path in brackets or with commas is to Hydra
    if _exists(value) if is_a_list else key.lstrip("+") in PATHS or _exists(value):
        return f"{key}={_quoted(value)}"
    return argument


def _quoted(value: str) -> str:
    """A path of a user's in quotes; ``${...}`` in it stays what it is."""
    return for_hydra(value).replace(r"\${", "${")


def _exists(value: str) -> bool:
    try:
        return "/" in value and Path(value).expanduser().exists()
    except (OSError, ValueError):  # no name that a file could have
        return False


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _read(value: str) -> Any:
    """What Hydra makes of a value without quotes, None of null; ``_UNREADABLE`` where it cannot read it."""
    try:
        override = _parser().parse_override(f"key={value}")
    except HydraException:
        return _UNREADABLE
    return override.value() if not override.is_sweep_override() else override
