"""Events of a sweep's trials, one line of JSON each, written by the processes that run them."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

EVENTS = ".trials.jsonl"  # in the sweep's directory


def log_event(sweep: Path, **event: Any) -> None:
    """Appends an event, with its time."""
    sweep.mkdir(parents=True, exist_ok=True)
    with (sweep / EVENTS).open("a") as file:  # one write per line, which other processes' writes cannot split
        file.write(json.dumps({"time": time.time(), **event}) + "\n")


class Events:
    """The events of a sweep that starts now."""

    def __init__(self, sweep: Path) -> None:
        self._file = sweep / EVENTS
        self._file.unlink(missing_ok=True)
        self._read = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Yields the events since the last call; skips lines that are no events."""
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):  # incomplete: it is being written
                    return
                self._read += len(line)
                event = None
                with suppress(ValueError):  # mixed writes, for example on a network disk
                    event = json.loads(line)
                if isinstance(event, dict):
                    yield event
