"""User mistakes: one clear sentence instead of a traceback."""

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

_MOST_LISTED = 3
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # disk full, quota exceeded, read-only
# Control characters of terminals, characters that reorder text, and undecodable bytes of file names.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """A mistake that the user can correct; its text is the whole message."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors from bad input (``ValueError``, ``OSError``, a missing package or value) into :class:`UserError`.

    Wraps the preparation of a run, where such an error means bad input; errors from training itself keep their
    traceback.
    """
    from hydra.errors import InstantiationException  # not imported by library users
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (ValueError, OSError, ImportError, InstantiationException, OmegaConfBaseException) as error:
        raise UserError(_message(error)) from error


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns errors from a full or read-only disk during a run into :class:`UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_DISKS:
            raise
        raise UserError(_message(error)) from error


def _message(error: BaseException) -> str:
    from hydra.errors import InstantiationException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    # Hydra wraps a constructor's error in its own message; show the constructor's.
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.errno in _OF_DISKS:
        file = error.filename or "a file"
        return f"{file} cannot be written ({error.strerror}): make room, or choose a folder on another disk."
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename} cannot be read or written ({error.strerror}): check the path and the access to it."
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; add {error.full_key}=... to the command."
    if isinstance(error, OmegaConfBaseException):  # further lines describe OmegaConf's types
        return re.sub(r"^\w+ raised while resolving interpolation: ", "", first_line(error))
    return str(error)


def malformed(error: Exception) -> str:
    """Returns what is wrong with a file's values, from the error that reading them raised, without Python's terms."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return first_line(error) if isinstance(error, ValueError) else "its values are of another kind"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printable(text: str) -> str:
    """Escapes control characters (``\\x1b`` becomes text): file and class names may be untrusted."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def some(items: Iterable[str]) -> str:
    """Joins the first few items, with ``...`` if there are more."""
    items = list(items)
    return ", ".join(items[:_MOST_LISTED]) + (", ..." if len(items) > _MOST_LISTED else "")


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """Returns ``" Did you mean 'a', 'b'?"`` with the nearest choices, or ``""`` if none is near.

    Case, ``-``, ``_`` and a library prefix are ignored: ``resnet-8`` is near ``resnet8``, and ``resnet34`` is near
    ``torchvision/resnet34``.
    """
    by_plain_name: dict[str, list[str]] = {}
    for choice in choices:
        by_plain_name.setdefault(_plain(choice), []).append(choice)
    plain = _plain(value)
    # If names differ only in spelling, suggest those alone.
    near = [plain] if plain in by_plain_name else get_close_matches(plain, by_plain_name, n=_MOST_LISTED)
    names = [choice for key in near for choice in by_plain_name[key]][:_MOST_LISTED]
    return f" Did you mean {', '.join(map(repr, names))}?" if names else ""


def _plain(name: str) -> str:
    return name.rpartition("/")[2].casefold().replace("_", "").replace("-", "")
