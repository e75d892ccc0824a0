"""Computes a teacher's logits of all views ahead, in batches as large as pay."""

import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from rld_lightning.console import console, duration, print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.distributed import is_rank_zero
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.teacher.logits_table import LogitsTable
from rld_lightning.models.teacher.resident_table import ResidentTable

_BATCH = {"cpu": 256}
_BATCH_ELSEWHERE = 2048
_AHEAD = 2  # batches that are computed while one is written
_IMAGES = 8  # whose views are looked at together, for what is missing
_SAY_SECONDS = 60.0


class FillAhead(Callback):
    """Fills the table of a run's teacher before its first step, once a checkpoint that it goes on from is accepted.

    With as many threads as there are when it is made: its batches are larger than those of a step.
    """

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Fills it; those who look at the checkpoint come before."""
        of_step = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        fill_table(pl_module.teacher, vars(trainer)["datamodule"], trainer)
        torch.set_num_threads(of_step)
        pl_module.teacher.place(trainer.strategy.root_device)


def fill_table(teacher: FrozenTeacher, data: ImageDataModule, trainer: Trainer) -> None:
    """Computes the logits of all views of the images that are trained on, as far as the teacher's table lacks them.

    As training does, in its precision. It may be interrupted, and goes on from what is there. Several processes, of
    this run or of others, take the images in different orders and leave out what the others have done.

    Args:
        teacher: with a table; it is brought to the trainer's device.
    """
    table = teacher.table
    assert table is not None
    data.trainer = trainer
    data.setup("fit")  # which brings the images to the trainer's device
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    teacher.place(device)
    if teacher.table is not None and teacher.table.complete:
        return
    # The file: whether all is known is looked up where it is brought to the device to train.
    table = table.file if isinstance(table, ResidentTable) else table
    teacher.remember(table)
    started, computed = time.monotonic(), 0
    writing: deque[Future[Tensor]] = deque()
    # Leaving waits for what is being written, whatever the reason.
    with _progress(data.train_size) as advance, ThreadPoolExecutor(1) as writer:
        for view in _batches(_missing(table, data, advance), _BATCH.get(device.type, _BATCH_ELSEWHERE)):
            batch = data.look_at(view.to(device))
            assert batch.view is not None  # of data whose views are counted
            with precision.forward_context():
                logits, _ = teacher(precision.convert_input(batch.images))
            writing.append(writer.submit(table.write, batch.view, logits, batch.label))
            computed += len(view)
            if len(writing) > _AHEAD:
                writing.popleft().result()
            if not table.is_writable:  # and has said why
                break
        for last in writing:
            last.result()
    if computed:
        seconds = time.monotonic() - started
        print_line("cache", f"{computed:,} views computed in {duration(seconds)}, {computed / seconds:,.0f} a second")


def _missing(table: LogitsTable, data: ImageDataModule, advance: Callable[[int], None]) -> Iterator[Tensor]:
    """Numbers of views that are not known, of a few images at a time, on the CPU: nothing waits for the device."""
    blocks = list(data.views_of(slice(0, data.train_size)).cpu().view(data.train_size, -1).split(_IMAGES))
    # Not drawn from the seed, which all processes share. Of two that took neighbours the faster one would catch up
    # with the other, and compute what that one does from then on.
    random.SystemRandom().shuffle(blocks)
    for block in blocks:
        view = block.flatten()
        yield view[~table.known(view)]
        advance(len(block))


def _batches(parts: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """The same numbers, ``size`` at a time; fewer at the end."""
    rest: Tensor | None = None
    for part in parts:
        *whole, rest = (part if rest is None else torch.cat([rest, part])).split(size)
        yield from whole
    if rest is not None and len(rest):
        yield rest


@contextmanager
def _progress(images: int) -> Iterator[Callable[[int], None]]:
    """A bar with what is left, or without a terminal a line a minute; gets how many images more are done."""
    done, started = 0, time.monotonic()
    said = started
    columns = (TextColumn("filling the cache"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, disable=not (console.is_terminal and is_rank_zero()), transient=True
    ) as bar:
        task = bar.add_task("", total=images)

        def advance(more: int) -> None:
            nonlocal done, said
            done += more
            bar.advance(task, more)
            now = time.monotonic()
            if not console.is_terminal and now - said > _SAY_SECONDS:
                said = now
                left = duration((now - started) * (images - done) / done)
                print_line("cache", f"{100 * done / images:.0f} % of the images looked at, {left} left")

        yield advance
