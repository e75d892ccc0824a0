"""Resumable, verified downloads."""

import hashlib
import shutil
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from rld_lightning.progress_bar import BAR, TimeLeft

BLOCK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60.0
SCHEMES = ("http", "https", "file")
# A server that sends a byte now and then would otherwise block a run for ever.
SLOWEST_BYTES_PER_SECOND = 10_000
SLOW_SECONDS = 60.0
# Free disk space to keep if the server does not send the length.
SPARE_BYTES = 1 << 30


class SpeedFloor:
    """Aborts a transfer that stays below ``SLOWEST_BYTES_PER_SECOND`` for ``SLOW_SECONDS``."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._received = 0

    def add(self, count: int) -> None:
        """Counts received bytes.

        Raises:
            ConnectionError: the transfer is too slow.
        """
        self._received += count
        seconds = time.monotonic() - self._since
        if seconds < SLOW_SECONDS:
            return
        speed = self._received / seconds
        if speed < SLOWEST_BYTES_PER_SECOND:
            raise ConnectionError(
                f"the server has sent {speed:,.0f} bytes/s for {seconds:.0f} s, less than the "
                f"minimum of {SLOWEST_BYTES_PER_SECOND:,}, run again later or from another address"
            )
        self._since, self._received = time.monotonic(), 0


@contextmanager
def _within(seconds: float, end: Callable[[], None]) -> Iterator[None]:
    """Limits the total time of a block, by calling ``end``: a socket's own timeout restarts with each byte.

    Raises:
        TimeoutError: the block took longer.
    """
    late = threading.Event()

    def stop() -> None:
        late.set()
        end()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    words = f"the server has sent nothing of use for {seconds:.0f} s, run again later or from another address"
    try:
        yield
    except (OSError, HTTPException) as error:  # whichever error closing the connection causes
        if late.is_set():
            raise TimeoutError(words) from error
        raise
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError(words)


def _shut(connected: socket.socket | None) -> None:
    if connected is not None:
        with suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)


class _Connection(HTTPConnection):
    """A connection whose server must answer in time, with all of its headers."""

    def request(self, *args: Any, **kwargs: Any) -> None:
        with _within(SLOW_SECONDS, lambda: _shut(self.sock)):
            super().request(*args, **kwargs)

    def getresponse(self) -> HTTPResponse:
        shut = partial(_shut, self.sock)
        with _within(SLOW_SECONDS, shut):
            response = super().getresponse()
        vars(response)["shut"] = shut
        return response


class _SecureConnection(_Connection, HTTPSConnection):
    """The same with TLS."""


class _Handler(HTTPHandler):
    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_Connection, req)


class _SecureHandler(HTTPSHandler):
    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, req)


class _Redirections(HTTPRedirectHandler):
    """Checks the target of a redirect before following it; HTTPS must not redirect to an unencrypted address."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        _check_scheme(newurl)
        if req.type == "https" and urlsplit(newurl).scheme.lower() != "https":
            raise ValueError(f"{req.full_url} leads to {newurl}, which is not encrypted, and is not followed there")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def urlopen(request: Request, timeout: float) -> Any:
    """Opens a request as urllib does, but with a time limit for the answer and restricted redirects."""
    return build_opener(_Handler, _SecureHandler, _Redirections).open(request, timeout=timeout)


def download(url: str, path: Path) -> None:
    """Downloads ``url`` to ``path`` with a progress bar, resuming a partial file.

    A partial file is kept if the connection breaks, so that the next call can resume. The caller verifies the content.

    Raises:
        OSError: the server is unreachable, lacks the file, is too slow (:class:`SpeedFloor`), or sends fewer or more
            bytes than announced, or the disk is full. (``http.client.HTTPException`` if the answer is not HTTP.)
        ValueError: the address is invalid, or it or its redirect is not of one of the ``SCHEMES``.
    """
    if path.is_symlink():  # a folder from elsewhere could contain a link to any file
        path.unlink()
    have = path.stat().st_size if path.exists() else 0
    try:
        total = _receive(url, path, have)
    except HTTPError as error:
        if not have or error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers["Content-Range"] != f"bytes */{have}":  # otherwise the file is complete
            path.unlink()  # longer than the file: a part of another file
            download(url, path)
        return
    received = path.stat().st_size
    if total is not None and received != total:  # a dropped connection ends the stream without an error
        raise ConnectionError(f"the connection broke off after {received} of {total} bytes, run again to continue")


def _receive(url: str, path: Path, have: int) -> int | None:
    """Appends to the first ``have`` bytes of a file, or restarts it; returns its expected size, if known."""
    _check_scheme(url)
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        _check_scheme(response.url)  # after redirects
        start = have if response.status == HTTPStatus.PARTIAL_CONTENT else 0
        length = response.headers["Content-Length"]
        total = start + int(length) if length and length.isdecimal() else None
        if total is not None:
            _check_space(path, total - start)
        floor = SpeedFloor()
        columns = (BarColumn(**BAR), DownloadColumn(), TransferSpeedColumn(), TimeLeft())
        bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True)
        with path.open("ab" if start else "wb") as file, bar:
            task = bar.add_task(f"downloading {url.rpartition('/')[2]}", total=total, completed=start)
            while block := _next_block(response):
                floor.add(len(block))
                if total is None:
                    _check_space(path, SPARE_BYTES)
                elif file.tell() + len(block) > total:  # for example chunked, where the length is not enforced
                    raise ConnectionError(f"the server sends more than the expected {total:,} bytes")
                file.write(block)
                bar.advance(task, len(block))
    return total


def _next_block(response: Any) -> bytes:
    """Reads what is available, unlike `read`, and at most for a limited time if only chunk headers arrive."""
    with _within(2 * SLOW_SECONDS, getattr(response, "shut", lambda: None)):
        return response.read1(BLOCK_BYTES)


def _check_scheme(url: str) -> None:
    scheme = urlsplit(url).scheme.lower()
    if scheme and scheme not in SCHEMES:  # without a scheme, urllib raises a clear error
        raise ValueError(f"addresses that begin with {scheme}: are refused, only {', '.join(SCHEMES)} are fetched")


def _check_space(path: Path, needed: int) -> None:
    if (free := shutil.disk_usage(path.parent).free) < needed:
        raise OSError(f"the disk of {path.parent} has {free / 1e9:.3g} GB free and {needed / 1e9:.3g} GB are needed")


def open_tar(file: BinaryIO) -> tarfile.TarFile:
    """Opens an uncompressed tar file.

    Raises:
        tarfile.ReadError: its first header cannot be read.
    """
    with _tar_errors():
        return tarfile.open(fileobj=file, mode="r:")


@contextmanager
def _tar_errors() -> Iterator[None]:
    """Turns what ``tarfile`` raises for damaged numbers in headers into its error for damaged files."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise tarfile.ReadError(f"a header that cannot be read, {error}") from error


def tar_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar file.

    Raises:
        tarfile.ReadError: a header cannot be read, or has a negative size, after which Python would yield the member
            for ever.
    """
    members = iter(tar)
    while True:
        with _tar_errors():
            member = next(members, None)
        if member is None:
            return
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes")
        yield member


def file_md5(path: Path) -> str:
    """Returns a file's MD5 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def fetch(url: str, target: Path, md5: str) -> None:
    """Downloads ``url`` to ``target`` and verifies it, resuming an interrupted call.

    The bytes are collected in ``<target>.part``, which is renamed once its checksum is correct.

    Args:
        target: the file to write; its folder must exist.

    Raises:
        FileNotFoundError: the download failed, see :func:`download`.
        ValueError: the file's MD5 differs from the expected one, or the address is not of one of the ``SCHEMES``.
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
