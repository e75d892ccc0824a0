"""The server of ``scripts/demo.py``: four fixed pages and one request, for this machine only.

Uses the standard library's server, not Gradio or an ASGI stack: there are two things to do, serve three small files and
answer requests for one picture, and what does not exist cannot fail. Gradio would add some forty packages, fonts and
scripts from other sites, telemetry that has to be switched off, and handlers that open files by requested paths. What
the standard library lacks is done here:

- it listens on 127.0.0.1 only;
- ``Host`` must be this machine, as a foreign page could resolve its own name to this address (DNS rebinding), and
  ``Origin`` of a request must be the page itself, so that no other page can send one;
- a picture's length is checked before it is read, its type before it is decoded, and no path is ever opened: the
  files are read once, before the first request;
- connections are limited in number, in idle time (seconds), and in total time (a minute);
- the page may load only its own files, and must not be shown in a frame.
"""

import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rld_lightning.console import print_line
from rld_lightning.data.decode import BadImageError
from rld_lightning.errors import UserError, first_line

Ask = Callable[[bytes, int | None], dict[str, Any]]

HOST = "127.0.0.1"
MOST_BYTES = 20_000_000  # of a picture
TYPES = ("image/jpeg", "image/png", "image/webp")
_MOST_CONNECTIONS = 32  # browsers open some in advance
_SECONDS = 10  # idle time of a connection
_MOST_SECONDS = 60  # total time of a request: a byte now and then is not idle
# Any port: an SSH tunnel may have another at its other end.
_OURS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")
_PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_JSON = "application/json"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class DemoServer(ThreadingHTTPServer):
    """Listens on a port of this machine.

    Args:
        facts: what the page needs before there is a picture.
        ask: maps a picture's bytes and the label to plain values.
        port: 0 for a free one.
    """

    daemon_threads = True
    request_queue_size = _MOST_CONNECTIONS

    def __init__(self, facts: Mapping[str, Any], ask: Ask, port: int) -> None:
        self.ask = ask
        self.pages = {path: ((_PAGE / name).read_bytes(), kind) for path, (name, kind) in _FILES.items()}
        limits = {"types": TYPES, "most_bytes": MOST_BYTES}
        self.pages["/facts"] = (json.dumps({**facts, **limits}).encode(), _JSON)
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """The page's URL."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Accepts a connection, unless there are too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers, and releases the connection's slot."""
        hearing = threading.Timer(_MOST_SECONDS, _close_connection, [request])
        hearing.daemon = True
        try:
            hearing.start()
            super().process_request_thread(request, client_address)
        finally:
            hearing.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing about broken connections."""


def _close_connection(request: socket.socket) -> None:
    with suppress(OSError):  # it has ended
        request.shutdown(socket.SHUT_RD)


def serve(facts: Mapping[str, Any], ask: Ask, port: int) -> None:
    """Serves the page until the process is stopped.

    Raises:
        UserError: the port is in use, or this user must not use it.
    """
    try:
        server = DemoServer(facts, ask, port)
    except OSError as error:
        raise UserError(
            f"port={port} cannot be had ({error.strerror}); choose another, or port=0 for a free one."
        ) from error
    with server:
        print_line("page", f"{server.address}  (Ctrl-C ends it)", pasted=True)
        server.serve_forever()


class _Refused(Exception):
    """A refused request, with the sentence that says why."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    """Handles the requests of a connection."""

    server: DemoServer
    timeout = _SECONDS
    server_version, sys_version = "rld-lightning", ""
    error_content_type = "text/plain; charset=utf-8"  # for errors that the base class sends itself
    error_message_format = "%(code)d\n"

    def do_GET(self) -> None:
        """Sends one of the fixed pages."""
        self._answer(self._page)

    def do_POST(self) -> None:
        """Answers a request for a picture."""
        self._answer(self._ask)

    def end_headers(self) -> None:
        """Adds the headers that all answers share."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: requests are not of interest, and their content must not reach a terminal."""

    def _answer(self, answer: Callable[[], tuple[bytes, str]]) -> None:
        status = HTTPStatus.OK
        try:
            self._check_host()
            content, kind = answer()
        except _Refused as refused:
            status, content, kind = refused.status, json.dumps({"error": str(refused)}).encode(), _JSON
        except TimeoutError:
            raise  # the client has gone
        except Exception as error:  # the server continues, and prints the error
            print_line("error", f"{type(error).__name__}: {first_line(error)}")
            status, kind = HTTPStatus.INTERNAL_SERVER_ERROR, _JSON
            content = json.dumps({"error": "That failed; the terminal says why."}).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _check_host(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not _OURS.fullmatch(hosts[0]):
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, "This page is for this machine alone.")

    def _page(self) -> tuple[bytes, str]:
        page = self.server.pages.get(urlsplit(self.path).path)
        if page is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page.")
        return page

    def _ask(self) -> tuple[bytes, str]:
        where = re.fullmatch(r"/ask(?:\?label=(\d{1,6}))?", self.path, re.ASCII)
        if where is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "There is no such page.")
        if self.headers.get_all("Origin", []) != [f"http://{self.headers['Host']}"]:
            raise _Refused(HTTPStatus.FORBIDDEN, "Only the page itself may ask.")
        content = self._content()
        try:
            found = self.server.ask(content, None if where[1] is None else int(where[1]))
        except BadImageError as error:
            raise _Refused(HTTPStatus.UNPROCESSABLE_ENTITY, f"This cannot be read as a picture: {error}.") from error
        except ValueError as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"{first_line(error)}.") from error
        return json.dumps(found, allow_nan=False).encode(), _JSON

    def _content(self) -> bytes:
        """Reads the picture's bytes, as many as announced and allowed."""
        if self.headers.get_all("Content-Type", []) not in [[kind] for kind in TYPES]:
            raise _Refused(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "JPEG, PNG and WebP pictures are taken, and nothing else."
            )
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or "Transfer-Encoding" in self.headers or not re.fullmatch(r"[0-9]{1,12}", lengths[0]):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "How long a picture is must be said first.")
        if not 0 < int(lengths[0]) <= MOST_BYTES:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"A picture has 1 to {MOST_BYTES:,} bytes, not {int(lengths[0]):,}.",
            )
        content = self.rfile.read(int(lengths[0]))
        if len(content) != int(lengths[0]):
            raise _Refused(HTTPStatus.BAD_REQUEST, "The picture broke off.")
        return content
