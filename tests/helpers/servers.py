"""Local servers that run during a test."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer


@contextmanager
def running(server: BaseServer) -> Iterator[BaseServer]:
    """Runs a server in a thread, and closes it at the end."""
    with server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


class FileServer(ThreadingHTTPServer):
    """Serves ``content`` at every URL; ``ranges`` (False: none), ``cut`` (bytes sent) and ``status`` make it fail."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _FileHandler)
        self.content, self.ranges, self.cut, self.status = content, True, None, 200
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_port}/file.tar"


class _FileHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        server.requests.append(wanted)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if server.status != 200:
            self.send_error(server.status)
            return
        if start and start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if server.cut is None else body[: server.cut])

    def log_message(self, *args):
        pass
