"""Computes a teacher's logits of all views ahead, in large batches."""

import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from rld_lightning.console import duration, print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.teacher.logits_table import LogitsTable
from rld_lightning.models.teacher.resident_table import ResidentTable
from rld_lightning.progress_bar import progress_bar
from rld_lightning.tasks.run.resume import is_over

_BATCH = {"cpu": 256}
_BATCH_ELSEWHERE = 2048
_AHEAD = 2  # batches computed while one is written
_IMAGES = 8  # images whose views are checked together for missing rows


class FillAhead(Callback):
    """Fills the table of a run's teacher before its first step, after the checkpoint to resume from was accepted.

    Uses the number of threads at its creation: its batches are larger than those of a step.
    """

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Fills the table unless nothing is left to train; callbacks that check the checkpoint run before."""
        if is_over(trainer):
            return
        of_step = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        # A teacher that is compiled for training steps would be compiled again for these batches.
        with torch.compiler.set_stance("force_eager"):
            fill_table(pl_module.teacher, vars(trainer)["datamodule"], trainer)
        torch.set_num_threads(of_step)
        pl_module.teacher.place(trainer.strategy.root_device)


def fill_table(teacher: FrozenTeacher, data: ImageDataModule, trainer: Trainer) -> None:
    """Computes the logits of all views of the training images that the teacher's table lacks.

    Uses the training's precision. It can be interrupted and continued. Several processes, of this or other runs,
    process the images in different orders and skip rows that others have computed.

    Args:
        teacher: with a table; it is moved to the trainer's device.
    """
    table = teacher.table
    assert table is not None
    data.trainer = trainer
    data.setup("fit")  # moves the images to the trainer's device
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    teacher.place(device)
    if teacher.table is not None and teacher.table.complete:
        return
    # The file: a resident table is checked for completeness when training moves it to the device.
    table = table.file if isinstance(table, ResidentTable) else table
    teacher.use_table(table)
    started, computed = time.monotonic(), 0
    writing: deque[Future[None]] = deque()
    # Leaving the block waits for pending writes, whatever the reason.
    with progress_bar("cache", "images looked at", data.train_size) as advance, ThreadPoolExecutor(1) as writer:
        for view in _batches(_missing(table, data, advance), _BATCH.get(device.type, _BATCH_ELSEWHERE)):
            batch = data.look_at(_queue_copy(view, device))
            with precision.forward_context():
                logits, _ = teacher(precision.convert_input(batch.images))
            logits, label = (_queue_copy(values, torch.device("cpu")) for values in (logits, batch.label))
            writing.append(writer.submit(_write, table, view, logits, label, _end_of_queue(device)))
            computed += len(view)
            if len(writing) > _AHEAD:
                writing.popleft().result()
            if not table.is_writable:  # it has printed the reason
                break
        for last in writing:
            last.result()
    if computed:
        seconds = time.monotonic() - started
        print_line("cache", f"{computed:,} views computed in {duration(seconds)}, {computed / seconds:,.0f} a second")


def _queue_copy(values: Tensor, device: torch.device) -> Tensor:
    """Copies to or from a GPU without waiting for the work before it, so that the GPU always has the next batch."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device, non_blocking=values.is_cuda)  # into pinned memory


def _end_of_queue(device: torch.device) -> torch.cuda.Event | None:
    """Marks the end of the work queued on a GPU so far."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _write(table: LogitsTable, view: Tensor, logits: Tensor, label: Tensor, copied: torch.cuda.Event | None) -> None:
    if copied is not None:
        copied.synchronize()  # waits for this batch only, and not for those queued since
    table.write(view, logits, label)


def _missing(table: LogitsTable, data: ImageDataModule, advance: Callable[[int], None]) -> Iterator[Tensor]:
    """Yields missing views, of a few images at a time, on the CPU: without synchronising with the device."""
    blocks = list(data.views_of(slice(0, data.train_size)).cpu().view(data.train_size, -1).split(_IMAGES))
    # Not from the seed, which all processes share: of two processes that work on neighbouring images the faster would
    # catch up with the other, and from then on compute the same.
    random.SystemRandom().shuffle(blocks)
    for block in blocks:
        view = block.flatten()
        yield view[~table.known(view)]
        advance(len(block))


def _batches(parts: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Regroups the numbers into batches of ``size``; the last may be smaller."""
    rest: Tensor | None = None
    for part in parts:
        *whole, rest = (part if rest is None else torch.cat([rest, part])).split(size)
        yield from whole
    if rest is not None and len(rest):
        yield rest
