"""Fetching a file so that what ends up under its name is complete and the one that was asked for."""

import hashlib
import urllib.request
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60.0


def file_md5(path: Path) -> str:
    """Return the MD5 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def fetch(url: str, target: Path, md5: str) -> None:
    """Download ``url`` to ``target``, continuing where an interrupted call stopped.

    The bytes are collected in ``<target>.part``, which is renamed only once its checksum is right.

    Args:
        url: What to download.
        target: Where to; its folder must exist.
        md5: The expected MD5.

    Raises:
        FileNotFoundError: If the server cannot be reached, lacks the file or stops before its end.
        ValueError: If the file has another MD5 than expected.
    """
    part = target.with_name(target.name + ".part")
    by_hand = f"Run again to retry, or get the file by other means and place it at {target}."
    try:
        try:
            _fetch_rest(url, part)
        except HTTPError as error:
            if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            if file_md5(part) != md5:  # longer than the file: the rest of something else
                part.unlink()
                _fetch_rest(url, part)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(f"Downloading {url} to {target} failed: {error}. {by_hand}") from error
    if (found := file_md5(part)) != md5:
        part.unlink()
        raise ValueError(f"{url} has MD5 {found} instead of {md5} and was discarded. {by_hand}")
    part.replace(target)


def _fetch_rest(url: str, part: Path) -> None:
    """Append to ``part`` what it lacks of ``url``, or start over where the server cannot continue."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response,
        Progress(*columns, TimeRemainingColumn()) as progress,
    ):
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            done = 0
        length = response.headers["Content-Length"]
        total = None if length is None else done + int(length)
        task = progress.add_task(f"downloading {url}", total=total, completed=done)
        with part.open("ab" if done else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                progress.update(task, completed=done)
    # A dropped connection ends the chunks without an error.
    if total is not None and done < total:
        raise ConnectionError(f"the connection ended after {done:,} of {total:,} bytes")
