"""A run folder belongs to one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rld_lightning.distributed import started_by
from rld_lightning.errors import UserError, user_errors
from rld_lightning.runs.files import LOCK


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Locks a run's folder for this process and those that it starts; does nothing in one of a group.

    Raises:
        UserError: another process trains in it.
    """
    lock = lock_folder(run, LOCK, "trained")
    try:
        yield
    finally:
        lock.release()


def lock_folder(folder: Path, name: str, what: str) -> FileLock:
    """Locks a folder, which it makes, until the lock is released or this process ends.

    Args:
        folder: the folder.
        name: of the lock's file in it.
        what: is done there: "trained" or "swept".

    Returns:
        the lock; one of a group of processes does not take it.

    Raises:
        UserError: another process has taken it.
    """
    lock = FileLock(folder / name)
    if started_by() is not None:
        return lock
    try:
        with user_errors():
            folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder} is being {what} in by another process; wait for it, end it, or choose another folder."
        ) from None
    return lock
