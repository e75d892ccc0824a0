"""Helpers for starting W&B runs: limited names, no secrets, no long waits, files in the run directory."""

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
_BLOCK, _HEADER = 32_768, 7  # bytes of a block of wandb's file, and of the header of each record


def within_limits(options: Mapping[str, Any]) -> dict[str, Any]:
    """Shortens names and tags to W&B's limits; ``tags`` may be a single tag."""
    tags = options.get("tags") or ()
    texts = (str(tag).strip() for tag in ([tags] if isinstance(tags, str) else tags) if tag is not None)
    short = {name: str(options[name])[:longest] for name, longest in _LONGEST.items() if name in options}
    return {**short, "tags": [*dict.fromkeys(text[:_LONGEST_TAG] for text in texts if text)]}


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable within a block, unless it is already set."""
    before = os.environ.get(name)
    os.environ[name] = before or value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


@contextmanager
def hidden_arguments() -> Iterator[None]:
    """Redacts the command line within a block: wandb stores it."""
    before = sys.argv
    sys.argv = redact_command(before)
    try:
        yield
    finally:
        sys.argv = before


def tear_down() -> None:
    """Ends wandb's process; the next run starts a new one."""
    import wandb

    with suppress(Exception):  # raised if the process has already ended
        wandb.teardown()


def next_step(folder: Path, run_id: str) -> int:
    """Returns the first ``_step`` that no file of a W&B run in a run directory has used; 0 without files."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # created on import

    last = -1
    files = folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")
    for path in filter(Path.is_file, files):  # not a pipe or device of a copied folder
        for content in records(path.read_bytes()):
            with suppress(Exception):  # an incomplete record of a killed process
                last = max(last, Record.FromString(content).history.step.num)
    return last + 1


def records(data: bytes) -> Iterator[bytes]:
    """Yields the records of a wandb file: a LevelDB log after a header of its own."""
    place, parts = _HEADER, bytearray()
    while place + _HEADER <= len(data):
        if (left := _BLOCK - place % _BLOCK) < _HEADER:  # this block has no room for a header
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        if kind in (1, 2):  # a record begins
            parts.clear()
        parts += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):  # a whole record, or its last part
            yield bytes(parts)
