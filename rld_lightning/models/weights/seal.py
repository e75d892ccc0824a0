"""Checksums inside the files that this package writes, to detect flipped bits.

Neither PyTorch's checkpoints nor safetensors are verified when read: a flipped bit silently changes a weight. Each
sealed file holds the SHA-256 of all its other bytes where readers of the format ignore it: in the comment at the end of
a PyTorch checkpoint, which is a zip archive, or in two entries of a safetensors file's metadata. Each format has two
marks of being sealed, so that a bit flipped in one of them does not make the file look unsealed.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from io import BytesIO

import safetensors.torch
from torch import Tensor

_DIGITS = 64
_ZERO = b"0" * _DIGITS

_END_RECORD = b"PK\x05\x06"  # end record of a zip archive, 22 bytes before its comment
_END_BYTES = 22
_COMMENT = b"rld-lightning sha256 "
_TAIL_BYTES = _END_BYTES + len(_COMMENT) + _DIGITS

_DIGEST_KEY, _SEALED_KEY = "rld_lightning_sha256", "rld_lightning_sealed"
_DIGEST = re.compile(rb'"rld_lightning_sha256":"([0-9a-f]{64})"')
_SEALED = b'"rld_lightning_sealed":"true"'
_MOST_HEADER = 1 << 24


def seal_checkpoint(saved: BytesIO) -> memoryview:
    """Returns the bytes of a checkpoint with its checksum."""
    comment = _COMMENT + _ZERO
    saved.seek(-2, 2)
    saved.write(len(comment).to_bytes(2, "little") + comment)
    content = saved.getbuffer()
    at = len(content) - _DIGITS
    content[at:] = _digest(content, at)
    return content


def sealed_safetensors(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytearray:
    """Returns the bytes of a safetensors file with its checksum, deterministic for given tensors and metadata.

    Args:
        tensors: contiguous, on the CPU, without shared memory.
    """
    marks = {_DIGEST_KEY: _ZERO.decode(), _SEALED_KEY: "true"}
    content = _in_order(safetensors.torch.save(tensors), {**metadata, **marks})
    match = _DIGEST.search(content, 0, _header_end(content))
    assert match is not None  # the key's quotes are never escaped
    at = match.start(1)
    content[at : at + _DIGITS] = _digest(content, at)
    return content


def _in_order(saved: bytes, metadata: Mapping[str, str]) -> bytearray:
    """Inserts metadata into a safetensors file in their given order; the library's order is random."""
    end = 8 + int.from_bytes(saved[:8], "little")
    header = {"__metadata__": dict(metadata), **json.loads(saved[8:end])}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return bytearray(len(text).to_bytes(8, "little") + text + saved[end:])


def is_damaged(content: bytes | bytearray | memoryview) -> bool:
    """Whether a file is sealed and its bytes do not match the checksum; False for files without a seal."""
    tail = bytes(content[-_TAIL_BYTES:])
    if tail.startswith(_END_RECORD) or tail[_END_BYTES:].startswith(_COMMENT):
        at = len(content) - _DIGITS
        return tail[-_DIGITS:] != _digest(content, at)
    header = bytes(content[: _header_end(content)])
    match = _DIGEST.search(header)
    if match is None:
        return _SEALED in header
    return match[1] != _digest(content, match.start(1))


def without_seal(metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the metadata without the entries added by :func:`sealed_safetensors`."""
    return {key: value for key, value in metadata.items() if key not in (_DIGEST_KEY, _SEALED_KEY)}


def _header_end(content: bytes | bytearray | memoryview) -> int:
    return 8 + min(int.from_bytes(content[:8], "little"), _MOST_HEADER)


def _digest(content: bytes | bytearray | memoryview, at: int) -> bytes:
    """Returns the hexadecimal SHA-256 of all bytes, with the checksum's digits at ``at`` counted as zeros."""
    view = memoryview(content)
    digest = hashlib.sha256(view[:at])
    digest.update(_ZERO)
    digest.update(view[at + _DIGITS :])
    return digest.hexdigest().encode()
