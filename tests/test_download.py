"""Downloads from servers that are slow, endless or lie, and addresses that are no downloads."""

import hashlib
import re
import shutil
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from rld_lightning import download as module
from rld_lightning.download import SLOWEST_BYTES_PER_SECOND, SpeedFloor, download, fetch


@contextmanager
def server(answer):
    """Answers every request with ``answer(handler)``; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with suppress(OSError):  # nobody listens any more
                answer(self)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        running.block_on_close = False
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/file.tar"
        running.shutdown()


def begin(handler, length=None):
    handler.send_response(200)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()


def trickle(handler):
    begin(handler, 10**6)
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


@pytest.mark.parametrize(
    "url",
    [
        "data:text/plain,hello",
        "local:///etc/passwd",
        "ftp://127.0.0.1/x",
        "reference://x",
        "simplecache::file:///etc/passwd",
        "DATA:,x",
    ],
)
def test_other_addresses_than_those_of_servers_and_files_are_refused(tmp_path, url):
    scheme = url.partition(":")[0].lower()
    with pytest.raises(ValueError, match=f"^addresses that begin with {scheme}: are refused, only http, https, file"):
        download(url, tmp_path / "x")
    with pytest.raises(ValueError, match="are refused"):
        fetch(url, tmp_path / "x", "0" * 32)
    assert not list(tmp_path.iterdir())


def test_a_redirection_to_another_kind_of_address_is_no_way_around(tmp_path, monkeypatch):
    def redirected(request, timeout):
        return contextmanager(lambda: (yield SimpleNamespace(url="ftp://127.0.0.1/x", status=200, headers={})))()

    monkeypatch.setattr(module, "urlopen", redirected)
    with pytest.raises(ValueError, match="addresses that begin with ftp: are refused"):
        download("http://127.0.0.1/x", tmp_path / "x")

    def to_a_file(handler):
        handler.send_response(302)
        handler.send_header("Location", "file:///etc/passwd")
        handler.end_headers()

    monkeypatch.undo()
    with server(to_a_file) as url, pytest.raises(OSError, match="not allowed"):
        download(url, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_files_and_servers_are_downloaded_from(tmp_path):
    content = b"content" * 100_000
    (tmp_path / "here").write_bytes(content)

    def send(handler):
        begin(handler, len(content))
        handler.wfile.write(content)

    with server(send) as url:
        for number, address in enumerate((url, (tmp_path / "here").as_uri())):
            fetch(address, tmp_path / f"{number}", hashlib.md5(content).hexdigest())
            assert (tmp_path / f"{number}").read_bytes() == content


def test_a_server_that_sends_a_byte_now_and_then_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SLOW_SECONDS", 0.3)
    with server(trickle) as url:
        start = time.monotonic()
        message = (
            r"failed: the server has sent \d+ bytes/s for \d s, less than the 10,000 that are waited for, run again"
        )
        with pytest.raises(FileNotFoundError, match=message):
            fetch(url, tmp_path / "x", "0" * 32)
        assert time.monotonic() - start < 60  # and not for ever
    assert 0 < (tmp_path / "x.part").stat().st_size < 100  # which the next call continues


def test_the_floor_is_on_the_speed_of_each_window(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    floor = SpeedFloor()
    for _ in range(200):  # just fast enough, however long it takes
        now += 1
        floor.add(SLOWEST_BYTES_PER_SECOND)
    floor.add(10**9)  # no window makes up for the next
    now += module.SLOW_SECONDS
    floor.add(1)
    now += module.SLOW_SECONDS
    with pytest.raises(ConnectionError, match="has sent 0 bytes/s for 60 s"):
        floor.add(1)


@pytest.mark.parametrize("length", [10**15, None])
def test_what_the_disk_has_no_room_for_is_not_written(tmp_path, monkeypatch, length):
    def send(handler):
        begin(handler, length)
        while True:
            handler.wfile.write(bytes(1 << 20))

    if length is None:
        monkeypatch.setattr(module, "SPARE_BYTES", shutil.disk_usage(tmp_path).free - (1 << 26))
    with server(send) as url:
        pattern = rf"the disk of {re.escape(str(tmp_path))} has \S+ GB free and \S+ GB are needed"
        with pytest.raises(OSError, match=pattern):
            download(url, tmp_path / "x")
    path = tmp_path / "x"
    assert not path.exists() if length else path.stat().st_size < 1 << 30


# What is sent at once, and what then comes byte by byte, over and over.
TRICKLES = {
    "status line": (b"HTTP/1.1 2", b"0"),
    "headers": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", b"X-Header: y\r\n"),
    "length of a part": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", b"0"),
    "redirection": (b"HTTP/1.1 302 Found\r\nLocation: /else\r\nContent-Length: 0\r\n", b"X-Header: y\r\n"),
}


@pytest.mark.parametrize(("at_once", "trickle"), TRICKLES.values(), ids=TRICKLES)
def test_a_server_that_sends_what_is_no_content_byte_by_byte_is_ended(tmp_path, monkeypatch, at_once, trickle):
    def send(handler):
        handler.wfile.write(at_once)
        handler.wfile.flush()
        while True:
            for byte in trickle:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.01)

    monkeypatch.setattr(module, "SLOW_SECONDS", 0.3)
    with server(send) as url:
        start = time.monotonic()
        with pytest.raises(FileNotFoundError, match=r"failed: the server has sent nothing of use for \d s, run again"):
            fetch(url, tmp_path / "x", "0" * 32)
        assert time.monotonic() - start < 60  # and not for ever
