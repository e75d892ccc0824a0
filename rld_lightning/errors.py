"""User mistakes: one clear sentence instead of a traceback."""

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

_MOST_LISTED = 3
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # full, or not to be written to
# What a terminal obeys, or shows letters in another order for; and bytes of a name that are no text.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """Something the user can put right; its text is the whole message."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns what bad input raises (``ValueError``, ``OSError``, a missing package or value) into :class:`UserError`.

    Wrapped around the preparation of a run, where such an error means the input; what training itself raises keeps its
    traceback.
    """
    from hydra.errors import InstantiationException  # library users have no need of Hydra
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (ValueError, OSError, ImportError, InstantiationException, OmegaConfBaseException) as error:
        raise UserError(_message(error)) from error


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns what a full or read-only disk raises, in the midst of a run, into :class:`UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_DISKS:
            raise
        raise UserError(_message(error)) from error


def _message(error: BaseException) -> str:
    from hydra.errors import InstantiationException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    # Hydra wraps what a constructor raised in a message of its own; the sentence to show is the constructor's.
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.errno in _OF_DISKS:
        file = error.filename or "a file"
        return f"{file} cannot be written ({error.strerror}): make room, or choose a folder on another disk."
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; add {error.full_key}=... to the command."
    if isinstance(error, OmegaConfBaseException):  # the lines behind the first one are about its own types
        return re.sub(r"^\w+ raised while resolving interpolation: ", "", first_line(error))
    return str(error)


def first_line(error: BaseException) -> str:
    """The first line of what an error says; of one that says nothing what it is called."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printable(text: str) -> str:
    """A text with ``\\x1b`` in the place of characters that a terminal would obey: names may be a stranger's."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def some(items: Iterable[str]) -> str:
    """Joins the first few items, and says that there are more."""
    items = list(items)
    return ", ".join(items[:_MOST_LISTED]) + (", ..." if len(items) > _MOST_LISTED else "")


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """``" Did you mean 'a', 'b'?"`` with the nearest choices, or ``""`` when none is near.

    Upper and lower case, ``-``, ``_`` and a library before a slash make no difference: ``resnet-8`` is near
    ``resnet8``, and ``resnet34`` is near ``torchvision/resnet34``.
    """
    by_plain_name: dict[str, list[str]] = {}
    for choice in choices:
        by_plain_name.setdefault(_plain(choice), []).append(choice)
    plain = _plain(value)
    # Names that differ in spelling only are what was meant; others beside them would be noise.
    near = [plain] if plain in by_plain_name else get_close_matches(plain, by_plain_name, n=_MOST_LISTED)
    names = [choice for key in near for choice in by_plain_name[key]][:_MOST_LISTED]
    return f" Did you mean {', '.join(map(repr, names))}?" if names else ""


def _plain(name: str) -> str:
    return name.rpartition("/")[2].casefold().replace("_", "").replace("-", "")
