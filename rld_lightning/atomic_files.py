"""Files that appear whole or not at all, and outlive a killed process and a machine that goes down."""

import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_BLOCK = 1 << 20
# Between the making of a temporary file and its lock lie microseconds.
_YOUNG_SECONDS = 1.0


def write_whole(path: Path, content: bytes | bytearray | memoryview, *, previous: Path | None = None) -> None:
    """Writes a file beside its place, reads it again, and puts it there; until then what was there stays.

    The temporary file lies in the same folder, and so on the same file system, where renaming is one step. Those that
    killed processes have left of the same file are removed.

    Args:
        path: the file; its folder is made if need be.
        content: all of it.
        previous: where the file that was there so far is kept; by default it is not.

    Raises:
        OSError: it cannot be written, or is not what was written; what was there is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for written in (path, previous) if previous is not None else (path,):
        remove_leftovers(written)
    temporary = _temporary(path)
    try:
        # Made with the usual rights of a new file, which those of `tempfile` do not have.
        with temporary.open("xb") as file, _held(temporary):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # so that it is read from the disk, where that is possible
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            _compare(temporary, content)
            if previous is not None and path.exists():
                _keep(path, previous)
            if sys.platform == "win32":  # which renames no open file
                file.close()
            os.replace(temporary, path)  # noqa: PTH105 -- atomic on every platform
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)  # which a write does not name
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Removes the temporary files of one that killed processes have left, and none that is being written."""
    for temporary in path.parent.glob(f".{_escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > _YOUNG_SECONDS and _is_abandoned(temporary):
                temporary.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _escape(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Marks a file as being written: a lock that ends with this process, however it ends."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_abandoned(path: Path) -> bool:
    if sys.platform == "win32":
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its writer has it, or there are no locks
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def _compare(path: Path, content: bytes | bytearray | memoryview) -> None:
    at, expected = 0, memoryview(content)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if block != bytes(expected[at : at + len(block)]):  # of a view each byte would be compared on its own
                break
            at += len(block)
    if at != len(expected):
        raise OSError(f"{path} is not what was written to it; the disk may be failing")


def _keep(path: Path, previous: Path) -> None:
    """Gives a file a second name, in place of an earlier one, so that there is always one under the first."""
    linked = _temporary(previous)
    try:
        os.link(path, linked)
        os.replace(linked, previous)  # noqa: PTH105 -- atomic
    except OSError:  # a file system without links: for a moment there is the second name alone
        os.replace(path, previous)  # noqa: PTH105 -- atomic
    finally:
        linked.unlink(missing_ok=True)  # which stays where both names are the same file already


def _sync_folder(folder: Path) -> None:
    """Makes the new name last as well, where folders can be synchronised."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
