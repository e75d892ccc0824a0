"""A cache file of the teacher's logits for every view of every training image.

Crops and flips make finitely many views of an image (162 with a padding of 4), and a frozen teacher always returns the
same logits for a view. The file is a table with one row per view. It is sparse: rows not yet written take no space.
"""

import errno
import json
import math
import os
import stat
import warnings
from collections.abc import Callable, Mapping
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORED = {"float16": torch.float16, "float32": torch.float32}
_VERSION = 1  # of the row format


class LogitsTable:
    """Rows of logits in a file that several processes read and write concurrently.

    Rows are read from a memory map of the file, but written with ``pwrite``: on a full disk, writing to the map would
    kill the process. After a failed write, no more rows are stored, with one warning.

    Each row ends in a checksum, so that rows not yet written (zeros), being written by another process or truncated by
    a crash are recognised and computed again. So no locks are needed.

    In float16, a logit is rounded by at most 2^-11 of its size, or 3 x 2^-11 if it would otherwise become equal to the
    label's: each class stays above or below the label, so that losses that compare the two, such as RLD's mask, decide
    as they would without the table. Logits out of the range of float16 are not stored.

    Args:
        path: the file; created, with its folder, if it does not exist.
        rows: N, the number of views.
        classes: C.
        dtype: the dtype of the stored logits, ``"float16"`` or ``"float32"``.

    Raises:
        ValueError: the dtype is unknown, or the file has another size.
        OSError: the file cannot be created.
    """

    complete = False  # not checked for all rows
    rows_to_read: Callable[[], Tensor] | None = None  # the rows that will be looked up, if not all

    def __init__(self, path: Path, rows: int, classes: int, dtype: str = "float16") -> None:
        if dtype not in STORED:
            raise ValueError(f"logits are stored in {' or '.join(STORED)}, not in {dtype!r}.")
        self.path = path
        self.dtype = STORED[dtype]
        self.classes = classes
        words = classes * self.dtype.itemsize // 2
        size = table_bytes(rows, classes, dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "r+b", buffering=0, opener=_open)  # noqa: SIM115 -- Path.open takes no opener
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size not in (0, size):
            self._file.close()
            raise ValueError(f"{path} has {status.st_size:,} bytes, not the {size:,} of this table; move it away.")
        os.truncate(self._file.fileno(), size)  # extends it with zeros
        flat = torch.from_file(str(path), shared=True, size=size // 2, dtype=torch.int16)
        self.table = flat.view(rows, words + 1)
        # Odd weights: exchanging two words of a row, or flipping a single bit, changes the sum.
        self.weights = 2 * torch.arange(words, dtype=torch.int32) + 1

    @property
    def is_writable(self) -> bool:
        """Whether rows are still stored: False after a failed write."""
        return not self._file.closed

    @property
    def is_empty(self) -> bool:
        """Whether the file is only holes."""
        return self.is_writable and os.fstat(self._file.fileno()).st_blocks == 0

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Looks up the logits of views.

        Args:
            rows: the views, int64 ``(B,)`` on any device.

        Returns:
            the logits, float32 ``(B, C)``, and which of them are known, bool ``(B,)``; both on the device of ``rows``.
        """
        content = self._rows(rows)
        return self._logits(content).to(rows.device), self._are_valid(content).to(rows.device)

    def read_known(self, rows: Tensor) -> Tensor:
        """Returns the logits, float32 ``(B, C)``, of known views, int64 ``(B,)``, without verifying checksums."""
        return self._logits(self._rows(rows)).to(rows.device)

    def known(self, rows: Tensor) -> Tensor:
        """Returns which views are known: int64 ``(B,)`` to bool ``(B,)``."""
        return self._are_valid(self._rows(rows)).to(rows.device)

    def write(self, rows: Tensor, logits: Tensor, label: Tensor) -> Tensor:
        """Stores the logits of views.

        Args:
            rows: the views, int64 ``(B,)``.
            logits: floating point ``(B, C)``.
            label: int64 ``(B,)``.

        Returns:
            the logits as :meth:`read` will return them, float32 ``(B, C)``; unchanged if they cannot be stored.
        """
        stored = round_beside_label(logits, label) if self.dtype == torch.float16 else logits.to(self.dtype)
        whole = stored.isfinite().all(1)
        words = stored[whole].to(self.table.device).view(torch.int16)
        self._store(rows[whole].to(self.table.device), torch.cat([words, self._checksum(words)[:, None]], 1))
        return torch.where(whole[:, None], stored.float(), logits.float())

    def _store(self, rows: Tensor, content: Tensor) -> None:
        if not (self.is_writable and len(rows)):
            return
        rows, order = rows.sort()
        content = content[order]
        starts = [0, *((rows.diff() != 1).nonzero().flatten() + 1).tolist()]  # consecutive rows are written at once
        width = content.shape[1] * content.itemsize
        try:
            for first, stop in pairwise([*starts, len(rows)]):
                whole = content[first:stop].numpy().data.cast("B")
                if os.pwrite(self._file.fileno(), whole, int(rows[first]) * width) < len(whole):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.close()
            why = error.strerror or error
            warnings.warn(f"no more of the teacher's logits are stored in {self.path}: {why}", stacklevel=3)

    def _rows(self, rows: Tensor) -> Tensor:
        return self.table.index_select(0, rows.to(self.table.device))  # on a CPU three times as fast as table[rows]

    def _logits(self, content: Tensor) -> Tensor:
        return content[:, :-1].contiguous().view(self.dtype).float()

    def _are_valid(self, content: Tensor) -> Tensor:
        finite = self._logits(content).isfinite().all(1)  # others are not stored
        return finite & (content[:, -1] == self._checksum(content[:, :-1]))

    def _checksum(self, words: Tensor) -> Tensor:
        # The offset makes a row of zeros invalid.
        return ((words.int() * self.weights).sum(1, dtype=torch.int32) + 0x5A5A).to(torch.int16)


def _open(path: str, _: int) -> int:
    """Opens or creates a file; in a folder that others may write to, refuses their symbolic links and pipes."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def round_beside_label(logits: Tensor, label: Tensor) -> Tensor:
    """Rounds logits to float16; one that would become equal to the label's is rounded to the neighbouring number.

    Args:
        logits: floating point ``(B, C)``.
        label: int64 ``(B,)``.

    Returns:
        float16 ``(B, C)``, each smaller than, equal to or greater than the label's exactly as in ``logits``.
    """
    rounded = logits.half()
    of_label, true = rounded.gather(1, label[:, None]), logits.gather(1, label[:, None])
    below, above = (_neighbour(of_label, towards) for towards in (-math.inf, math.inf))
    tied = rounded == of_label
    rounded = torch.where(tied & (logits < true), below, rounded)
    return torch.where(tied & (logits > true), above, rounded)


def _neighbour(values: Tensor, towards: float) -> Tensor:
    """Returns the next float16 above or below."""
    step = 1 if towards > 0 else -1
    bits = values.view(torch.int16)
    away = (values > 0) == (step > 0)  # from 0: a larger magnitude is a larger number of bits
    moved = torch.where(away, bits + 1, bits - 1).to(torch.int16)
    smallest = torch.tensor(1 if step > 0 else -0x7FFF, dtype=torch.int16, device=values.device)
    return torch.where(values == 0, smallest, moved).view(torch.float16)


def table_bytes(rows: int, classes: int, dtype: str) -> int:
    """Returns the size of a table's file with all rows."""
    return rows * (classes * STORED[dtype].itemsize + 2)


def table_key(state_dict: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Returns a table's name: a hash of the teacher and everything else that its logits depend on.

    Args:
        facts: plain values of everything else: data, views, normalisation, precision, and the storage format.
    """
    digest = blake2b(json.dumps({"version": _VERSION, **facts}, sort_keys=True).encode(), digest_size=8)
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
