"""User mistakes: one clear sentence instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException


class UserError(Exception):
    """Something the user can put right; its text is the whole message."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns what bad input raises (``ValueError``, ``OSError``, a missing package or value) into :class:`UserError`.

    Wrapped around the preparation of a run, where such an error means the input; what training itself raises keeps its
    traceback.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, InstantiationException, OmegaConfBaseException) as error:
        raise UserError(_message(error)) from error


def _message(error: BaseException) -> str:
    # Hydra wraps what a constructor raised in a message of its own; the sentence to show is the constructor's.
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; add {error.full_key}=... to the command."
    return str(error)
