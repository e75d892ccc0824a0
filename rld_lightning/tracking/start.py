"""What surrounds the start of a W&B run: names within limits, no secrets, no long waits, files beside the run's own."""

import os
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rld_lightning.redact import redact_command

LONGEST_NAME = 128  # characters
_LONGEST = {"name": LONGEST_NAME, "group": LONGEST_NAME, "job_type": 64}
_LONGEST_TAG = 64
_BLOCK, _HEADER = 32_768, 7  # bytes of a block of the file that wandb writes, and of what stands before each record


def within_limits(options: Mapping[str, Any]) -> dict[str, Any]:
    """Names and tags as long as W&B takes them; a single tag may be written as such."""
    tags = options.get("tags") or ()
    texts = (str(tag).strip() for tag in ([tags] if isinstance(tags, str) else tags) if tag is not None)
    short = {name: str(options[name])[:longest] for name, longest in _LONGEST.items() if name in options}
    return {**short, "tags": [*dict.fromkeys(text[:_LONGEST_TAG] for text in texts if text)]}


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Sets a variable for a while, unless it is set already."""
    before = os.environ.get(name)
    os.environ[name] = before or value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


@contextmanager
def hidden_arguments() -> Iterator[None]:
    """wandb keeps the command line; this is what it sees of it."""
    before = sys.argv
    sys.argv = redact_command(before)
    try:
        yield
    finally:
        sys.argv = before


def tear_down() -> None:
    """Ends wandb's process; the next run starts another one."""
    import wandb

    with suppress(Exception):  # which is what it raises where there is no process any more
        wandb.teardown()


def next_step(folder: Path, run_id: str) -> int:
    """The first ``_step`` that no file of a W&B run in a run folder has yet; 0 without any."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when it is imported

    last = -1
    for path in folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb"):
        for content in _records(path.read_bytes()):
            with suppress(Exception):  # what a killed process has left of a record
                last = max(last, Record.FromString(content).history.step.num)
    return last + 1


def _records(data: bytes) -> Iterator[bytes]:
    """What is in a file of wandb's, a log of LevelDB's behind a header of its own."""
    place, parts = _HEADER, b""
    while place + _HEADER <= len(data):
        if (left := _BLOCK - place % _BLOCK) < _HEADER:  # no room for a header in this block
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        parts = (b"" if kind in (1, 2) else parts) + data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
