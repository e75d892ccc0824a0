"""A job that turns out to be a mistake, or is ended before its work, leaves nothing that was not there before it."""

import shutil
from pathlib import Path

from filelock import FileLock

from rld_lightning.distributed import rank_zero_only
from rld_lightning.runs.files import HYDRA, LOCK, SPLIT

# What there is of a job, beside its log, before its work begins. Whatever else lies there tells of work that was done.
_OF_PREPARATION = (HYDRA, LOCK, SPLIT)

_FAILURE = "Traceback (most recent call last)"  # of a process that was lost, say: no mistake of the user's

_made: list[Path] = []  # the folders that this process's job has Hydra make, the innermost first


def will_make(folder: Path) -> None:
    """Notes which folders are missing, before Hydra makes the one of a job."""
    _made[:] = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]


@rank_zero_only
def clear_mistake() -> None:
    """Takes the folder of this job away again, and those above it, if it has made them and done no work in them.

    One that was begun at the same moment as another may have thought that it made the folder which that one works in.
    """
    if not _made or not (folder := _made[0]).is_dir():
        return
    there = list(folder.iterdir())
    if any((path.name not in _OF_PREPARATION and path.suffix != ".log") or path.is_symlink() for path in there):
        return
    if any(_FAILURE in path.read_text(errors="replace") for path in there if path.suffix == ".log"):
        return
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except OSError:  # of which a timeout is one
        return
    for path in there:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)
    lock.release()
    (folder / LOCK).unlink(missing_ok=True)
    for path in _made:
        try:
            path.rmdir()
        except OSError:  # another job's folder lies in it
            return
