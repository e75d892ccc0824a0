"""Downloads that continue where they broke off, and are what was asked for."""

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
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

BLOCK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60.0
SCHEMES = ("http", "https", "file")
# A server that sends a byte now and then would otherwise keep a run waiting for ever.
SLOWEST_BYTES_PER_SECOND = 10_000
SLOW_SECONDS = 60.0
# What a download whose length the server does not say leaves free on the disk.
SPARE_BYTES = 1 << 30


class SpeedFloor:
    """Ends a transfer that stays below ``SLOWEST_BYTES_PER_SECOND`` for ``SLOW_SECONDS``."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._received = 0

    def add(self, count: int) -> None:
        """Counts bytes that were received.

        Raises:
            ConnectionError: they come too slowly.
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
    """Ends what takes longer: a socket's own timeout begins anew with each byte.

    Raises:
        TimeoutError: it did.
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
    except (OSError, HTTPException) as error:  # whatever the end of its connection is taken for
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
    """One to a server that has to answer in time, with all of its headers."""

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
    """The same, encrypted."""


class _Handler(HTTPHandler):
    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_Connection, req)


class _SecureHandler(HTTPSHandler):
    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, req)


class _Redirections(HTTPRedirectHandler):
    """Looks at where an address leads, before it is followed; an encrypted one may lead to none that is not."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        _check_scheme(newurl)
        if req.type == "https" and urlsplit(newurl).scheme.lower() != "https":
            raise ValueError(f"{req.full_url} leads to {newurl}, which is not encrypted, and is not followed there")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def urlopen(request: Request, timeout: float) -> Any:
    """As urllib's, but that servers have to answer in time, and lead to none but other servers."""
    return build_opener(_Handler, _SecureHandler, _Redirections).open(request, timeout=timeout)


def download(url: str, path: Path) -> None:
    """Fetches ``url`` to ``path``, continuing a file that is partly there, with a progress bar.

    What was received stays if the connection breaks, so that the next call can continue. Whether the content is the
    right one is the caller's to check.

    Raises:
        OSError: the server cannot be reached, lacks the file, is too slow (:class:`SpeedFloor`), stops before its
            end or goes on after it, or the disk has no room for it. (``http.client.HTTPException`` for answers that are
            no HTTP.)
        ValueError: the address is none, or not of one of the ``SCHEMES``, or leads to such a one.
    """
    if path.is_symlink():  # a folder that came from elsewhere could have one that leads to any file
        path.unlink()
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
    _check_scheme(url)
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        _check_scheme(response.url)  # after redirections
        start = have if response.status == HTTPStatus.PARTIAL_CONTENT else 0
        length = response.headers["Content-Length"]
        total = start + int(length) if length and length.isdecimal() else None
        if total is not None:
            _check_space(path, total - start)
        floor = SpeedFloor()
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True)
        with path.open("ab" if start else "wb") as file, bar:
            task = bar.add_task(f"downloading {url.rpartition('/')[2]}", total=total, completed=start)
            while block := _next_block(response):
                floor.add(len(block))
                if total is None:
                    _check_space(path, SPARE_BYTES)
                elif file.tell() + len(block) > total:  # in pieces, say, which the length is not heeded of
                    raise ConnectionError(f"the server sends more than the expected {total:,} bytes")
                file.write(block)
                bar.advance(task, len(block))
    return total


def _next_block(response: Any) -> bytes:
    """What is there, where `read` would wait for all of it; for nothing, such as the length of a part, not for ever."""
    with _within(2 * SLOW_SECONDS, getattr(response, "shut", lambda: None)):
        return response.read1(BLOCK_BYTES)


def _check_scheme(url: str) -> None:
    scheme = urlsplit(url).scheme.lower()
    if scheme and scheme not in SCHEMES:  # without any, urllib says what is wrong
        raise ValueError(f"addresses that begin with {scheme}: are refused, only {', '.join(SCHEMES)} are fetched")


def _check_space(path: Path, needed: int) -> None:
    if (free := shutil.disk_usage(path.parent).free) < needed:
        raise OSError(f"the disk of {path.parent} has {free / 1e9:.3g} GB free and {needed / 1e9:.3g} GB are needed")


def tar_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """What is in a tar file.

    Raises:
        tarfile.ReadError: a member has a size below 0, behind which Python would find the same one for ever.
    """
    for member in tar:
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes")
        yield member


def file_md5(path: Path) -> str:
    """The MD5 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def fetch(url: str, target: Path, md5: str) -> None:
    """Downloads ``url`` to ``target``, continuing where an interrupted call stopped.

    The bytes are collected in ``<target>.part``, which is renamed only once its checksum is right.

    Args:
        target: where to; its folder must exist.

    Raises:
        FileNotFoundError: the file cannot be had, see :func:`download`.
        ValueError: the file has another MD5 than expected, or the address is not of one of the ``SCHEMES``.
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
