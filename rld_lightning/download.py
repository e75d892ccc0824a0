"""Downloads that continue where they broke off, and are what was asked for."""

import hashlib
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

BLOCK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60.0


def download(url: str, path: Path) -> None:
    """Fetches ``url`` to ``path``, continuing a file that is partly there, with a progress bar.

    What was received stays if the connection breaks, so that the next call can continue. Whether the content is the
    right one is the caller's to check.

    Raises:
        OSError: the server cannot be reached, lacks the file, or stops before its end. (``http.client.HTTPException``
            and ``ValueError`` for answers that are no HTTP and for addresses that are none.)
    """
    have = path.stat().st_size if path.exists() else 0
    try:
        total = _receive(url, path, have)
    except HTTPError as error:
        if not have or error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers["Content-Range"] != f"bytes */{have}":  # else all of it is here already
            path.unlink()  # longer than the file: the rest of something else
            download(url, path)
        return
    received = path.stat().st_size
    if total is not None and received != total:  # a dropped connection ends the blocks without an error
        raise ConnectionError(f"the connection broke off after {received} of {total} bytes, run again to continue")


def _receive(url: str, path: Path, have: int) -> int | None:
    """Appends to the first ``have`` bytes of a file, or starts over; returns how long it should be now, if known."""
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        start = have if response.status == HTTPStatus.PARTIAL_CONTENT else 0
        length = response.headers["Content-Length"]
        total = start + int(length) if length else None
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True)
        with path.open("ab" if start else "wb") as file, bar:
            task = bar.add_task(f"downloading {url.rpartition('/')[2]}", total=total, completed=start)
            while block := response.read(BLOCK_BYTES):
                file.write(block)
                bar.advance(task, len(block))
    return total


def file_md5(path: Path) -> str:
    """The MD5 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def fetch(url: str, target: Path, md5: str) -> None:
    """Downloads ``url`` to ``target``, continuing where an interrupted call stopped.

    The bytes are collected in ``<target>.part``, which is renamed only once its checksum is right.

    Args:
        url: what to download.
        target: where to; its folder must exist.
        md5: the expected MD5.

    Raises:
        FileNotFoundError: the server cannot be reached, lacks the file or stops before its end.
        ValueError: the file has another MD5 than expected.
    """
    part = target.with_name(target.name + ".part")
    by_hand = f"You can also get the file by other means and place it at {target}."
    try:
        download(url, part)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(f"Downloading {url} to {target} failed: {error}. {by_hand}") from error
    if (found := file_md5(part)) != md5:
        part.unlink()
        raise ValueError(f"{url} has MD5 {found} instead of {md5} and was discarded. {by_hand}")
    part.replace(target)
