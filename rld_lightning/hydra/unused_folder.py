"""Removes the folder of a job that ends before its work starts, by a user's mistake or Ctrl-C."""

import shutil
from pathlib import Path

from filelock import FileLock

from rld_lightning.distributed import rank_zero_only
from rld_lightning.runs.files import HYDRA, LOCK, SPLIT

# The files of a job, besides its log, before its work starts. Any other file means that work was done.
_PREPARATION_FILES = (HYDRA, LOCK, SPLIT)

_FAILURE = "Traceback (most recent call last)"  # for example of a crashed process: not a mistake of the user

_missing_folders: list[Path] = []  # the folders that Hydra creates for this process's job, the innermost first


def note_missing_folders(folder: Path) -> None:
    """Stores which folders are missing before Hydra creates a job's folder."""
    _missing_folders[:] = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]


@rank_zero_only
def remove_unused_folder() -> None:
    """Removes this job's folder and its parents, if they were created for this job and no work was done in them.

    The lock is checked because another job that started at the same time may use the folder.
    """
    if not _missing_folders or not (folder := _missing_folders[0]).is_dir():
        return
    files = list(folder.iterdir())
    if any((path.name not in _PREPARATION_FILES and path.suffix != ".log") or path.is_symlink() for path in files):
        return
    if any(_FAILURE in path.read_text(errors="replace") for path in files if path.suffix == ".log"):
        return
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except OSError:  # includes ``Timeout``
        return
    for path in files:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)
    lock.release()
    (folder / LOCK).unlink(missing_ok=True)
    for path in _missing_folders:
        try:
            path.rmdir()
        except OSError:  # it contains another job's folder
            return
