"""Quotes values for the shell and for Hydra, and adds the quotes for Hydra that users omit."""

import re
import shlex
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

# Keys whose values are files, folders or URLs, including Hydra's for the directories of runs and sweeps.
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
    """Returns an override that can be pasted into a shell: ``"resume='runs/a=1/last.ckpt'"``."""
    return _for_shell(f"{key}={for_hydra(str(value))}")


def as_command(arguments: Iterable[str]) -> str:
    """Returns arguments of Hydra as a command that can be pasted into a shell."""
    return " ".join(map(_for_shell, arguments))


def _for_shell(argument: str) -> str:
    # More readable than shlex's '"'"', if no character is special in double quotes.
    return f'"{argument}"' if "'" in argument and not set(argument) & set('"$`\\!') else shlex.quote(argument)


def for_hydra(text: str) -> str:
    """Returns a text in Hydra's grammar, quoted if Hydra would read it as something else."""
    if _read(text) == text and not text.startswith("'") and "${" not in text:
        return text
    # In Hydra's grammar, a backslash escapes only before a quote.
    inner = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", r"\'"), text)
    return "'" + inner.replace("${", r"\${") + "'"


def with_quotes(arguments: Iterable[str]) -> list[str]:
    """Adds the quotes that Hydra needs (the shell removes the user's), if a value can only be a path.

    That is, if Hydra cannot parse ``key=value`` or would not read a single text, and the key is one of :data:`PATHS` or
    the file exists: ``weights=runs/seed=1/student.safetensors``. A comma-separated list is quoted as several paths if
    all exist.
    """
    return [_with_quotes(argument) for argument in arguments]


def read_text(value: str) -> str:
    """Returns the text of a value on a command line, with or without Hydra's quotes."""
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
    is_a_list = read is not _UNREADABLE  # Hydra reads a path with brackets or commas as a list
    if _exists(value) if is_a_list else key.lstrip("+") in PATHS or _exists(value):
        return f"{key}={_quoted(value)}"
    return argument


def _quoted(value: str) -> str:
    """Quotes a user's path; keeps interpolations ``${...}``."""
    return for_hydra(value).replace(r"\${", "${")


def _exists(value: str) -> bool:
    try:
        return "/" in value and Path(value).expanduser().exists()
    except (OSError, ValueError):  # not a valid file name
        return False


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _read(value: str) -> Any:
    """Returns the value that Hydra reads from an unquoted text (None for null), or ``_UNREADABLE``."""
    try:
        override = _parser().parse_override(f"key={value}")
    except HydraException:
        return _UNREADABLE
    return override.value() if not override.is_sweep_override() else override
