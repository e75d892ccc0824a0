"""A run folder belongs to one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rld_lightning.distributed import started_by
from rld_lightning.errors import UserError, user_errors


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Keeps a run's folder to this process and those that it starts; does nothing in one of a group.

    Raises:
        UserError: another process trains in it.
    """
    lock = lock_folder(run, ".lock", "trained")
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
        the lock; in one of a group of processes it is not taken.

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
