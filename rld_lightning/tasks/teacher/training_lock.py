"""Lets one of several runs that lack the same teacher train it; the others wait and use it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rld_lightning.atomic_files import write_whole
from rld_lightning.console import print_line
from rld_lightning.distributed import external_launcher, is_rank_zero
from rld_lightning.errors import UserError
from rld_lightning.models.teacher.teacher_store import TeacherStore

_POLL_SECONDS = 0.2
# Equal for the processes of one run, together with its directory, and different between runs.
_GROUP = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID")


@contextmanager
def training_turn(
    store: TeacherStore, dataset: str, name: str, run: Path, *, for_others: bool = True
) -> Iterator[bool]:
    """Waits until no other run trains a teacher for the store, and makes other runs wait meanwhile.

    Of a run's processes, the first waits for other runs, and the others for its result. The lock ends with its process,
    however that ends.

    Args:
        for_others: whether the teacher is to be stored; otherwise no run waits.

    Yields:
        whether the teacher still has to be trained.

    Raises:
        UserError: the store is not writable; raised before the training.
    """
    if not for_others:
        yield True
        return
    place = store.path(dataset, name)
    lock = FileLock(place.with_name(f".{place.stem}.lock"))
    holder, own = place.with_name(f".{place.stem}.holder"), _group(run)
    if external_launcher() is not None and not is_rank_zero():
        yield _wait_for_the_first(store, dataset, name, lock, holder, own)
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _wait(lock, f"{name} is being trained for {place} by another run: waiting for it")
        lacks = not store.has(dataset, name)
        if lacks:
            write_whole(holder, own.encode())  # replaces a link that another user may have placed there
    except OSError as error:
        lock.release()
        raise UserError(
            f"the teacher {name} cannot be kept in {place.parent} ({error.strerror or error}): make the folder "
            "writable, or choose another with paths.teachers=."
        ) from error
    try:
        yield lacks
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _wait(lock: FileLock, words: str) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print_line("teacher", words)
        lock.acquire()
    except NotImplementedError:  # a file system without locks: both runs train
        pass


def _wait_for_the_first(store: TeacherStore, dataset: str, name: str, lock: FileLock, holder: Path, own: str) -> bool:
    while True:
        if store.has(dataset, name):
            return False
        if holder.is_file() and holder.read_text() == own and _is_held(lock, holder):
            return True
        time.sleep(_POLL_SECONDS)


def _is_held(lock: FileLock, holder: Path) -> bool:
    """Whether a process holds the lock; if none does, removes the holder file that a killed process has left."""
    try:
        with lock.acquire(timeout=0):
            holder.unlink(missing_ok=True)
    except (Timeout, NotImplementedError):
        return True
    return False


def _group(run: Path) -> str:
    return " ".join([str(run.absolute()), *(os.environ.get(name, "") for name in _GROUP)])
