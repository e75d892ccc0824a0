"""Locks run directories for one process at a time, and checks that they can be written to."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rld_lightning.distributed import external_launcher
from rld_lightning.errors import UserError, user_errors
from rld_lightning.runs.files import LOCK, WANDB


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Locks a run's directory for this process and those that it starts; does nothing in a group of processes.

    Raises:
        UserError: another process is training in it.
    """
    lock = lock_folder(run, LOCK, "trained")
    try:
        yield
    finally:
        lock.release()


def lock_folder(folder: Path, name: str, what: str) -> FileLock:
    """Creates and locks a directory until the lock is released or this process ends.

    Args:
        what: the activity: "trained" or "swept".

    Returns:
        the lock; not acquired in a group of processes.

    Raises:
        UserError: another process holds it, or the directory cannot be written to.
    """
    lock = FileLock(folder / name)
    if external_launcher() is not None:
        return lock
    with user_errors():
        check_folder(folder, "hydra.run.dir=" if what == "trained" else "hydra.sweep.dir= (folder= of compare.py)")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:  # an OSError, whose own message would be shown otherwise
            raise UserError(
                f"{folder} is being {what} in by another process; wait for it, end it, or choose another folder."
            ) from None
    return lock


def check_within(folder: Path, above: Path, option: str) -> None:
    """Checks that a directory to be written to is within the directory that was named.

    Args:
        folder: such as ``<run>/export``, which need not exist yet.
        above: the directory that was named, which may be untrusted.
        option: the option that names another one.

    Raises:
        ValueError: it is a link that leads out of it.
    """
    if folder.is_symlink() and not folder.resolve().is_relative_to(above.resolve()):
        raise ValueError(f"{folder} is a link out of {above}, where nothing is written: give {option} yourself.")


def check_folder(folder: Path, option: str = "hydra.run.dir=", written: Collection[str] | None = None) -> None:
    """Checks that a job can write into a directory, and that no link leads its writes elsewhere.

    The directory may be untrusted: files are written through links, so a link in it could lead to any file.

    Args:
        folder: the directory, which need not exist yet, and may itself be a link.
        option: the option that names another one.
        written: names of its files and directories that may be written; others may be links. By default all.

    Raises:
        ValueError: it is a file, cannot be written to, or contains a link that leads out of it.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"{there} is not a folder; choose another one with {option}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there} cannot be written to: make it writable, or choose another one with {option}.")
    if there == folder and (link := next(_leading_out(folder, written), None)) is not None:
        raise ValueError(
            f"{link} is a link to {link.readlink()}, out of the folder, where nothing is written: remove it, or "
            f"choose another folder with {option}."
        )


def _leading_out(folder: Path, written: Collection[str] | None) -> Iterator[Path]:
    """Yields the links in and below a directory that lead out of it, among the names that are written."""
    inside = folder.resolve()
    for path, inner, files in os.walk(folder):
        if written is not None and Path(path) == folder:
            inner[:], files = [name for name in inner if name in written], [name for name in files if name in written]
        for name in (*inner, *files):
            link = Path(path, name)
            if link.is_symlink() and not link.resolve().is_relative_to(inside):
                yield link
        if WANDB in inner:
            inner.remove(WANDB)  # wandb recreates its links, and its run directories have names of their own
