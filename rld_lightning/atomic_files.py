"""Atomic file writes that survive a killed process and a power failure."""

import fcntl
import glob
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_BLOCK = 1 << 20
# A temporary file is locked within microseconds of its creation.
_YOUNG_SECONDS = 1.0


def write_whole(path: Path, content: bytes | bytearray | memoryview, *, previous: Path | None = None) -> None:
    """Writes a file atomically: writes and verifies a temporary file, then renames it; the old file stays until then.

    The temporary file is in the same folder, hence on the same file system, where renaming is atomic. Temporary files
    of the same target left by killed processes are removed.

    Args:
        path: the file; its folder is created if needed.
        content: the whole content.
        previous: where to keep the replaced file; by default it is not kept.

    Raises:
        OSError: the file cannot be written, or differs from what was written; the old file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for written in (path, previous) if previous is not None else (path,):
        remove_leftovers(written)
    temporary = _temporary(path)
    try:
        # With a new file's usual permissions, unlike `tempfile`'s.
        with temporary.open("xb") as file, _locked(temporary):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # to verify what is on the disk; not on macOS
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            _verify(temporary, content)
            if previous is not None and path.exists():
                _link_previous(path, previous)
            os.replace(temporary, path)  # noqa: PTH105 -- atomic on every platform
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # errors from writes name no file, others the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Removes a file's temporary files that killed processes left; keeps those that are being written."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime > _YOUNG_SECONDS and _is_abandoned(temporary):
                temporary.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Locks a file while it is being written; the lock ends with this process, however it ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_abandoned(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its writer holds the lock, or there are no locks
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def _verify(path: Path, content: bytes | bytearray | memoryview) -> None:
    at, expected = 0, memoryview(content)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if block != bytes(expected[at : at + len(block)]):  # comparing the view itself would be byte by byte
                break
            at += len(block)
    if at != len(expected):
        raise OSError(f"{path} is not what was written to it; the disk may be failing")


def _link_previous(path: Path, previous: Path) -> None:
    """Links a file to a second name, replacing the earlier one, so that the first name always exists."""
    linked = _temporary(previous)
    try:
        os.link(path, linked)
        os.replace(linked, previous)  # noqa: PTH105 -- atomic
    except OSError:  # a file system without links: for a moment only the second name exists
        os.replace(path, previous)  # noqa: PTH105 -- atomic
    finally:
        linked.unlink(missing_ok=True)  # os.replace keeps it if both names are the same file


def _sync_folder(folder: Path) -> None:
    """Makes the rename durable, if folders can be synchronised."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
