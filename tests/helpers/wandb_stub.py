"""A local stub of W&B's server, and a reader of the files that offline runs write."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from wandb.proto.wandb_internal_pb2 import Record

from helpers.servers import running
from rld_lightning.tracking.start import records

VIEWER = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
PROJECT = {"id": "p", "name": "project", "entity": {"id": "e", "name": "me"}}
BUCKET = {"id": "b", "displayName": "run", "config": "{}", "historyLineCount": 0, "project": PROJECT}


class Handler(BaseHTTPRequestHandler):
    """Answers according to ``server.behaviour``, one of the cases below; ``late`` never answers."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        behaviour = self.server.behaviour
        for text, later in self.server.after.items():
            if text in body:
                self.server.behaviour = later
        match behaviour:
            case "late":
                self.server.closing.wait(600)
            case "drip":
                self.send_response(200)
                self.end_headers()
                while not self.server.closing.wait(0.05):
                    self.wfile.write(b" ")
            case "error":
                self.answer(500, {"errors": [{"message": "broken"}]})
            case "refuse":
                self.answer(401, {"errors": [{"message": "who are you?"}]})
            case "stranger":
                self.answer(200, ["an", "other", "service"])
            case "deep":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"[" * 100_000)
            case "headers":
                self.send_response(200)
                for _ in range(200):
                    self.send_header("A", "b")
                self.answer(200, {})
            case "well":
                self.answer(200, {"data": self.data(body)})

    do_GET = do_PUT = do_HEAD = do_POST

    def data(self, body):
        if "UpsertBucket" in body:
            name = json.loads(body)["variables"].get("name")
            return {"upsertBucket": {"inserted": True, "bucket": BUCKET | {"name": name}}}
        if "iewer" in body:
            info = {"cliVersionInfo": {"max_cli_version": "9.9.9", "min_cli_version": "0.1.0"}, "features": []}
            return {"viewer": VIEWER, "serverInfo": info}
        return {}

    def answer(self, status, content):
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *_arguments):  # a client that disconnected
        pass


@contextmanager
def serving(behaviour: str, after: dict[str, str] | None = None) -> Iterator[Server]:
    """Runs a server on 127.0.0.1; ``after`` maps a text in a request to the behaviour from then on."""
    server = Server(("127.0.0.1", 0), Handler)
    server.behaviour, server.after, server.closing = behaviour, after or {}, threading.Event()
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    with running(server):
        try:
            yield server
        finally:
            server.closing.set()


def read_run(folder) -> list[Record]:
    """The records of the only W&B run in a run directory."""
    (path,) = folder.glob("wandb/*run-*/run-*.wandb")
    return read_file(path)


def read_file(path) -> list[Record]:
    """The records of a file of an offline run."""
    return [Record.FromString(content) for content in records(path.read_bytes())]


def values(items) -> dict:
    """The values of a list of updates, with nested keys joined by dots."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
