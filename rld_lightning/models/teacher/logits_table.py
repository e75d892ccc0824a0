"""The logits of a teacher for every view of every training image: computed once, kept in a file, looked up after that.

A crop and a flip make finitely many views of an image (162 with a padding of 4), and a frozen teacher says the same of
a view whenever it is met. The file is one table, a row a view. It is sparse: what was not met takes no room.
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
_VERSION = 1  # of the rows


class LogitsTable:
    """Rows of logits in a file that several processes fill and read at once.

    Rows are read from a mapping of the file into memory, and written as bytes into the file: where the disk is full,
    writing into a mapping would end the process, and so rows are not kept any more, which is said once.

    A row ends in a checksum of its own: what is not there yet (zeros), what another process is just writing and what a
    crash has left half written is not taken for logits, but computed again. So nothing is locked.

    Stored in float16, a logit is rounded by at most 2^-11 of its size, or 3 x 2^-11 where it would have become equal to
    the label's: no class changes sides of the label, so that losses that compare the two, as RLD's mask does, decide as
    they would have without the table. Logits beyond what float16 holds are not kept.

    Args:
        path: the file; made, with its folder, where there is none.
        rows: N, how many views there are.
        classes: C.
        dtype: what logits are stored in, ``"float16"`` or ``"float32"``.

    Raises:
        ValueError: an unknown dtype, or a file of another size.
        OSError: the file cannot be made.
    """

    complete = False  # nobody has looked at all rows
    asked: Callable[[], Tensor] | None = None  # the rows that will be looked up, where it is not all

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
        found = os.fstat(self._file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size not in (0, size):
            self._file.close()
            raise ValueError(f"{path} has {found.st_size:,} bytes, not the {size:,} of this table; move it away.")
        os.truncate(self._file.fileno(), size)  # which lengthens it by zeros
        flat = torch.from_file(str(path), shared=True, size=size // 2, dtype=torch.int16)
        self.table = flat.view(rows, words + 1)
        # Odd weights: no two words of a row can be exchanged, and no single bit flipped, without another sum.
        self.weights = 2 * torch.arange(words, dtype=torch.int32) + 1

    @property
    def keeps(self) -> bool:
        """Whether rows are still written: not any more once that has failed."""
        return not self._file.closed

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Looks views up.

        Args:
            rows: which, int64 ``(B,)`` on any device.

        Returns:
            logits, float32 ``(B, C)``, and which of them are known, bool ``(B,)``; both on the device of ``rows``.
        """
        found = self._rows(rows)
        return self._logits(found).to(rows.device), self._are_whole(found).to(rows.device)

    def read_known(self, rows: Tensor) -> Tensor:
        """Logits, float32 ``(B, C)``, of views that are known, int64 ``(B,)``: nobody looks whether they are."""
        return self._logits(self._rows(rows)).to(rows.device)

    def known(self, rows: Tensor) -> Tensor:
        """Which views are known, bool ``(B,)`` of int64 ``(B,)``."""
        return self._are_whole(self._rows(rows)).to(rows.device)

    def write(self, rows: Tensor, logits: Tensor, label: Tensor) -> Tensor:
        """Keeps the logits of views.

        Args:
            rows: which, int64 ``(B,)``.
            logits: floating point ``(B, C)``.
            label: int64 ``(B,)``.

        Returns:
            what :meth:`read` will say of them, float32 ``(B, C)``; logits that cannot be kept are as they were.
        """
        stored = round_beside_label(logits, label) if self.dtype == torch.float16 else logits.to(self.dtype)
        whole = stored.isfinite().all(1)
        words = stored[whole].to(self.table.device).view(torch.int16)
        self._keep(rows[whole].to(self.table.device), torch.cat([words, self._checksum(words)[:, None]], 1))
        return torch.where(whole[:, None], stored.float(), logits.float())

    def _keep(self, rows: Tensor, content: Tensor) -> None:
        if not self.keeps:
            return
        if not hasattr(os, "pwrite"):  # on Windows
            self.table[rows] = content
            return
        rows, order = rows.sort()
        content = content[order]
        starts = [0, *((rows.diff() != 1).nonzero().flatten() + 1).tolist()]  # of neighbours, in one go
        width = content.shape[1] * content.itemsize
        try:
            for first, stop in pairwise([*starts, len(rows)]):
                whole = content[first:stop].numpy().data.cast("B")
                if os.pwrite(self._file.fileno(), whole, int(rows[first]) * width) < len(whole):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.close()
            why = error.strerror or error
            warnings.warn(f"no more of the teacher's logits are kept in {self.path}: {why}", stacklevel=3)

    def _rows(self, rows: Tensor) -> Tensor:
        return self.table.index_select(0, rows.to(self.table.device))  # on a CPU three times as fast as table[rows]

    def _logits(self, found: Tensor) -> Tensor:
        return found[:, :-1].contiguous().view(self.dtype).float()

    def _are_whole(self, found: Tensor) -> Tensor:
        return found[:, -1] == self._checksum(found[:, :-1])

    def _checksum(self, words: Tensor) -> Tensor:
        # Not 0 of a row of zeros.
        return ((words.int() * self.weights).sum(1, dtype=torch.int32) + 0x5A5A).to(torch.int16)


def _open(path: str, _: int) -> int:
    """Opens or makes a file, in a folder that others may write to: no link of theirs to another one, and no pipe."""
    safely = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, os.O_RDWR | os.O_CREAT | safely, 0o666)


def round_beside_label(logits: Tensor, label: Tensor) -> Tensor:
    """Rounds logits to float16, each at most to the neighbour of the label's where it would have become equal to it.

    Args:
        logits: floating point ``(B, C)``.
        label: int64 ``(B,)``.

    Returns:
        float16 ``(B, C)`` that are smaller, equal and greater than the label's where ``logits`` are.
    """
    rounded = logits.half()
    of_label, true = rounded.gather(1, label[:, None]), logits.gather(1, label[:, None])
    below, above = (_neighbour(of_label, towards) for towards in (-math.inf, math.inf))
    tied = rounded == of_label
    rounded = torch.where(tied & (logits < true), below, rounded)
    return torch.where(tied & (logits > true), above, rounded)


def _neighbour(values: Tensor, towards: float) -> Tensor:
    """The next float16 above or below."""
    step = 1 if towards > 0 else -1
    bits = values.view(torch.int16)
    away = (values > 0) == (step > 0)  # from 0: a larger magnitude is a larger number of bits
    moved = torch.where(away, bits + 1, bits - 1).to(torch.int16)
    smallest = torch.tensor(1 if step > 0 else -0x7FFF, dtype=torch.int16, device=values.device)
    return torch.where(values == 0, smallest, moved).view(torch.float16)


def table_bytes(rows: int, classes: int, dtype: str) -> int:
    """The size of a table's file when all its rows are there."""
    return rows * (classes * STORED[dtype].itemsize + 2)


def table_key(state_dict: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """What a table is called, so that it is found for the same teacher and the same views, and for no others.

    Args:
        facts: plain values of everything else that decides what it says: data, views, normalisation, precision, and
            how it is stored.
    """
    digest = blake2b(json.dumps({"version": _VERSION, **facts}, sort_keys=True).encode(), digest_size=8)
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
