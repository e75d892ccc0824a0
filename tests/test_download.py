"""Downloads from slow, endless or lying servers, and refused addresses."""

import hashlib
import re
import shutil
import time
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request

import pytest
from helpers.servers import running

from rld_lightning import download as module
from rld_lightning.download import SLOWEST_BYTES_PER_SECOND, SpeedFloor, download, fetch


@contextmanager
def server(answer):
    """Answers every request with ``answer(handler)``; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with suppress(OSError):  # the client has disconnected
                answer(self)

        def log_message(self, *args):
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as started:
        yield f"http://127.0.0.1:{started.server_port}/file.tar"


def send_headers(handler, length=None):
    handler.send_response(200)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()


def trickle(handler):
    send_headers(handler, 10**6)
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
def test_addresses_with_other_schemes_are_refused(tmp_path, url):
    scheme = url.partition(":")[0].lower()
    with pytest.raises(ValueError, match=f"^addresses that begin with {scheme}: are refused, only http, https, file"):
        download(url, tmp_path / "x")
    with pytest.raises(ValueError, match="are refused"):
        fetch(url, tmp_path / "x", "0" * 32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("ftp://127.0.0.1:1/x", "begin with ftp: are refused"),
        ("file:///etc/passwd", "not allowed"),
        ("data:,x", "not allowed"),
    ],
)
def test_redirections_to_other_schemes_are_refused(tmp_path, location, words):
    def lead_there(handler):
        handler.send_response(302)
        handler.send_header("Location", location)
        handler.end_headers()

    with server(lead_there) as url, pytest.raises((OSError, ValueError), match=words):
        download(url, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_redirections_from_https_to_http_are_refused():
    request = Request("https://a.example/x")
    lead = partial(module._Redirections().redirect_request, request, None, 302, "Found", {})
    assert lead("https://b.example/x").full_url == "https://b.example/x"
    with pytest.raises(ValueError, match=r"leads to http://b\.example/x, which is not encrypted"):
        lead("http://b.example/x")


def test_files_and_servers_can_be_downloaded(tmp_path):
    content = b"content" * 100_000
    (tmp_path / "here").write_bytes(content)

    def send(handler):
        send_headers(handler, len(content))
        handler.wfile.write(content)

    with server(send) as url:
        for number, address in enumerate((url, (tmp_path / "here").as_uri())):
            fetch(address, tmp_path / f"{number}", hashlib.md5(content).hexdigest())
            assert (tmp_path / f"{number}").read_bytes() == content


def test_a_slow_transfer_is_aborted(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SLOW_SECONDS", 0.3)
    with server(trickle) as url:
        start = time.monotonic()
        message = r"failed: the server has sent \d+ bytes/s for \d s, less than the minimum of 10,000, run again"
        with pytest.raises(FileNotFoundError, match=message):
            fetch(url, tmp_path / "x", "0" * 32)
        assert time.monotonic() - start < 60  # not endless
    assert 0 < (tmp_path / "x.part").stat().st_size < 100  # the next call resumes it


def test_the_minimum_speed_applies_to_each_window(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    floor = SpeedFloor()
    for _ in range(200):  # just fast enough for any duration
        now += 1
        floor.add(SLOWEST_BYTES_PER_SECOND)
    floor.add(10**9)  # does not compensate for the next window
    now += module.SLOW_SECONDS
    floor.add(1)
    now += module.SLOW_SECONDS
    with pytest.raises(ConnectionError, match="has sent 0 bytes/s for 60 s"):
        floor.add(1)


@pytest.mark.parametrize("length", [10**15, None])
def test_downloads_that_exceed_the_disk_are_not_written(tmp_path, monkeypatch, length):
    def send(handler):
        send_headers(handler, length)
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


@pytest.mark.parametrize("head", [{"Content-Length": "10", "Transfer-Encoding": "chunked"}, {"Content-Length": "-5"}])
def test_data_beyond_the_stated_length_is_not_written(tmp_path, monkeypatch, head):
    def send(handler):
        handler.send_response(200)
        for name, value in head.items():
            handler.send_header(name, value)
        handler.end_headers()
        while True:
            handler.wfile.write(b"100000\r\n" * (len(head) > 1) + bytes(1 << 20) + b"\r\n")

    monkeypatch.setattr(module, "SPARE_BYTES", shutil.disk_usage(tmp_path).free - (1 << 24))
    with server(send) as url, pytest.raises(OSError, match=r"more than the expected 10 bytes|GB are needed"):
        download(url, tmp_path / "x")
    assert (tmp_path / "x").stat().st_size < 1 << 28


def test_nothing_is_written_through_a_link(tmp_path):
    mine = tmp_path / "mine"
    mine.write_bytes(b"my ")
    (tmp_path / "x").symlink_to(mine)
    (tmp_path / "here").write_bytes(b"my content")
    download((tmp_path / "here").as_uri(), tmp_path / "x")
    assert (mine.read_bytes(), (tmp_path / "x").read_bytes()) == (b"my ", b"my content")


# The beginning of each answer, and the bytes that then follow slowly without end.
TRICKLES = {
    "status line": (b"HTTP/1.1 2", b"0"),
    "headers": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", b"X-Header: y\r\n"),
    "length of a part": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", b"0"),
    "redirection": (b"HTTP/1.1 302 Found\r\nLocation: /else\r\nContent-Length: 0\r\n", b"X-Header: y\r\n"),
}


@pytest.mark.parametrize(("at_once", "trickle"), TRICKLES.values(), ids=TRICKLES)
def test_slow_headers_are_aborted(tmp_path, monkeypatch, at_once, trickle):
    def send(handler):
        handler.wfile.write(at_once)
        handler.wfile.flush()
        while True:
            for byte in trickle:
                handler.wfile.write(bytes([byte]))
                time.sleep(0.01)

    monkeypatch.setattr(module, "SLOW_SECONDS", 0.3)
    monkeypatch.setattr(module, "SLOWEST_BYTES_PER_SECOND", 0)  # a busy machine may receive slowly
    with server(send) as url:
        start = time.monotonic()
        with pytest.raises(FileNotFoundError, match=r"failed: the server has sent nothing of use for \d s, run again"):
            fetch(url, tmp_path / "x", "0" * 32)
        assert time.monotonic() - start < 60  # not endless
