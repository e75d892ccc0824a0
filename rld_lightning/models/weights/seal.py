"""Checksums inside the files that this package writes, so that no flipped bit goes unseen.

Neither PyTorch's checkpoints nor safetensors are checked when they are read: a flipped bit is another weight. Here each
file holds the SHA-256 of all its other bytes, where readers of the format do not look: the comment at the end of a
PyTorch checkpoint, which is a zip archive, and two entries of the metadata of a safetensors file. Each kind has two
marks of being sealed, so that a bit that is flipped in one of them does not pass for a file of somebody else's.
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

_END_RECORD = b"PK\x05\x06"  # that of a zip archive, 22 bytes before its comment
_END_BYTES = 22
_COMMENT = b"rld-lightning sha256 "
_TAIL_BYTES = _END_BYTES + len(_COMMENT) + _DIGITS

_DIGEST_KEY, _SEALED_KEY = "rld_lightning_sha256", "rld_lightning_sealed"
_DIGEST = re.compile(rb'"rld_lightning_sha256":"([0-9a-f]{64})"')
_SEALED = b'"rld_lightning_sealed":"true"'
_MOST_HEADER = 1 << 24


def seal_checkpoint(saved: BytesIO) -> memoryview:
    """The bytes of a checkpoint with their checksum."""
    comment = _COMMENT + _ZERO
    saved.seek(-2, 2)
    saved.write(len(comment).to_bytes(2, "little") + comment)
    content = saved.getbuffer()
    at = len(content) - _DIGITS
    content[at:] = _digest(content, at)
    return content


def sealed_safetensors(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytearray:
    """The bytes of a safetensors file with their checksum, the same for the same tensors and metadata.

    Args:
        tensors: contiguous, on the CPU, none shares memory with another.
    """
    marks = {_DIGEST_KEY: _ZERO.decode(), _SEALED_KEY: "true"}
    content = _in_order(safetensors.torch.save(tensors), {**metadata, **marks})
    found = _DIGEST.search(content, 0, _header_end(content))
    assert found is not None  # a key of text, whose quotes are not escaped
    at = found.start(1)
    content[at : at + _DIGITS] = _digest(content, at)
    return content


def _in_order(saved: bytes, metadata: Mapping[str, str]) -> bytearray:
    """A safetensors file with metadata in their order, where the library's is another one each time."""
    end = 8 + int.from_bytes(saved[:8], "little")
    header = {"__metadata__": dict(metadata), **json.loads(saved[8:end])}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return bytearray(len(text).to_bytes(8, "little") + text + saved[end:])


def is_damaged(content: bytes | bytearray | memoryview) -> bool:
    """Whether a file is sealed and its bytes are others than those that were sealed; False of files without a seal."""
    tail = bytes(content[-_TAIL_BYTES:])
    if tail.startswith(_END_RECORD) or tail[_END_BYTES:].startswith(_COMMENT):
        at = len(content) - _DIGITS
        return tail[-_DIGITS:] != _digest(content, at)
    header = bytes(content[: _header_end(content)])
    found = _DIGEST.search(header)
    if found is None:
        return _SEALED in header
    return found[1] != _digest(content, found.start(1))


def without_seal(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata as they were given to :func:`sealed_safetensors`."""
    return {key: value for key, value in metadata.items() if key not in (_DIGEST_KEY, _SEALED_KEY)}


def _header_end(content: bytes | bytearray | memoryview) -> int:
    return 8 + min(int.from_bytes(content[:8], "little"), _MOST_HEADER)


def _digest(content: bytes | bytearray | memoryview, at: int) -> bytes:
    """The SHA-256 of all bytes but the digits of the checksum at ``at``, as digits."""
    view = memoryview(content)
    digest = hashlib.sha256(view[:at])
    digest.update(_ZERO)
    digest.update(view[at + _DIGITS :])
    return digest.hexdigest().encode()
