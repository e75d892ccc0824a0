"""Progress of long work: a bar on one line of a terminal, otherwise a line a minute. Training looks the same."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from rld_lightning.console import console, duration, print_line
from rld_lightning.distributed import is_rank_zero

PRINT_SECONDS = 60.0  # between lines without a terminal
BAR: dict[str, Any] = {"bar_width": 12} | dict.fromkeys(("complete_style", "finished_style", "pulse_style"), "#6206E0")


@contextmanager
def progress_bar(name: str, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows on rank 0 how much of some work is done; the bar disappears at its end.

    Args:
        name: what heads a line.
        what: the work, as beside the bar.
        total: number of items.

    Yields:
        a function that adds finished items.
    """
    columns = (TextColumn("{task.description}"), BarColumn(**BAR), MofNCompleteColumn(), TimeLeft())
    done, started = 0, time.monotonic()
    printed = started
    shown = console.is_terminal and is_rank_zero()
    bar = Progress(*columns, console=console, disable=not shown, transient=True)
    with bar if shown else nullcontext():  # older versions of Rich end a disabled bar with an empty line
        task = bar.add_task(what, total=total)

        def advance(more: int) -> None:
            nonlocal done, printed
            done += more
            bar.advance(task, more)
            now = time.monotonic()
            if not console.is_terminal and done and now - printed >= PRINT_SECONDS:
                printed = now
                left = duration((now - started) * (total - done) / done)
                print_line(name, f"{what}: {100 * done / total:.0f} %, {left} left")

        yield advance


class TimeLeft(ProgressColumn):
    """Column with the time left; empty until it is known."""

    max_refresh = 0.5  # seconds

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))

    def seconds(self, task: Task) -> float | None:
        """Returns the time left; None until it is known."""
        return task.time_remaining

    def render(self, task: Task) -> Text:
        """Returns the column's text."""
        seconds = self.seconds(task)
        return Text("" if seconds is None else f"{duration(seconds)} left", style="dim")
