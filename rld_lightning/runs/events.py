"""What happens to the trials of a sweep, a line of JSON each, written by whatever process runs them."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

EVENTS = ".trials.jsonl"  # in the sweep's folder


def note(sweep: Path, **event: Any) -> None:
    """Adds an event, with its time."""
    sweep.mkdir(parents=True, exist_ok=True)
    with (sweep / EVENTS).open("a") as file:  # one write of one line, which no other process's cuts in two
        file.write(json.dumps({"time": time.time(), **event}) + "\n")


class Events:
    """The events of a sweep that begins now, as they come."""

    def __init__(self, sweep: Path) -> None:
        self._file = sweep / EVENTS
        self._file.unlink(missing_ok=True)
        self._read = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Those that have come since the last call; what is no event is passed over."""
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):  # it is being written
                    return
                self._read += len(line)
                event = None
                with suppress(ValueError):  # two cut each other, on a disk of several machines say
                    event = json.loads(line)
                if isinstance(event, dict):
                    yield event
