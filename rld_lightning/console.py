"""What a run prints: the configuration as a tree, one line a part, a table at the end."""

import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from rld_lightning.distributed import Stopped, is_first, rank_zero_only
from rld_lightning.errors import UserError, printable
from rld_lightning.redact import redact, redact_text

console = Console(highlight=False)
_copies: list[TextIO] = []  # files that get what is printed, see `printed_to`
_WIDE = 1000  # columns of what is cropped at the console's width, and is there to be copied

# Said by a run's own lines, or by design: checkpoints, metrics and configuration share the run folder, and what is
# logged at the end of an epoch is already the same on all ranks.
_NOISE = (
    "It is recommended to use `self.log.*sync_dist=True.*",
    ".*treespec, LeafSpec.*",
    "Experiment logs directory .* exists and is not empty.*",
    "Checkpoint directory .* exists and is not empty.*",
    "The number of training batches .* is smaller than the logging interval.*",
    "The ``compute`` method of metric .* was called before the ``update`` method.*",  # it was restored
    ".*does not have many workers which may be a bottleneck.*",
    "This DataLoader will create .* worker processes in total.*",  # data.num_workers, of which a store keeps many busy
)


def look_again() -> None:
    """Finds out anew what the console prints to, in a process that was forked and prints elsewhere."""
    vars(console).update(vars(Console(highlight=False)))


@cache
def quiet_lightning() -> None:
    """Silences, once a process, what Lightning prints at every start and that says nothing about this run."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning").propagate = False  # it has a handler of its own, and Hydra's root would say it again
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(
        lambda record: (
            not record.getMessage().startswith(
                (
                    "💡",
                    "`Trainer.fit` stopped: `max_epochs",
                    "GPU available",
                    "TPU available",
                    "Loading `",
                    "Using bfloat16",
                    "Restoring states from",
                    "Restored all states from",
                )
            )
        )
    )


@contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """Adds to a file what rank 0 prints, what Lightning tells, and what ends this, if it is an error."""
    if not is_first():
        yield
        return
    with path.open("a", buffering=1) as file:
        handler = logging.StreamHandler(file)
        lightning = logging.getLogger("lightning.pytorch")
        _copies.append(file)
        lightning.addHandler(handler)
        try:
            yield
        except BaseException as error:
            file.write(f"{printable(redact_text(_told(error).rstrip()))}\n")
            raise
        finally:
            lightning.removeHandler(handler)
            _copies.remove(file)


def _told(error: BaseException) -> str:
    """What ends a run, for its log: a sentence of ours, a signal, or a traceback."""
    if isinstance(error, Stopped):
        return f"ended by {error.signal.name}"
    if isinstance(error, Exception) and not isinstance(error, UserError):
        return traceback.format_exc()
    return f"error: {error}" if str(error) else type(error).__name__


def _say(*objects: Any, width: int | None = None, shown: str | None = None, **options: Any) -> None:
    screen = console if width is None else Console(width=width, highlight=False)
    screen.print(*(objects if shown is None else [shown]), **options)
    for file in _copies:
        copy = Console(file=file, width=width or 120, highlight=False, color_system=None)
        copy.print(*objects, **options)


@rank_zero_only
def print_config(cfg: DictConfig) -> None:
    """Prints the resolved configuration as a tree, without secrets."""
    tree = Tree("[bold]configuration")
    values: Any = redact(OmegaConf.to_container(cfg, resolve=True))
    _grow(tree, values)
    _say(tree, width=_WIDE)


def _grow(tree: Tree, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            _grow(tree.add(f"[cyan]{_plain(key)}"), value)
        else:
            tree.add(f"[cyan]{_plain(key)}[/]: {_plain(value)}")


@rank_zero_only
def print_line(name: str, text: str, *, pasted: bool = False) -> None:
    """Prints one line about a part of the run: ``name`` in a column of its own.

    In a terminal it is folded between words; what is ``pasted`` into a command line never is.
    """
    text = printable(redact_text(text))
    head, folded = f"[bold]{name:>8}[/]  ", text if pasted else _folded(text, max(len(name), 8) + 2, " " * 10)
    _say(head + escape(text), shown=head + escape(folded), soft_wrap=True)


def end_line() -> None:
    """Leaves, in a terminal, the line in which it has written ``^C``, behind a bar perhaps."""
    if console.is_terminal:
        console.print()


def print_error(text: str) -> None:
    """Prints what is wrong, for a user to put right; from whatever process has found it."""
    text = printable(redact_text(text))
    head = "[bold red]error:[/] "
    _say(head + escape(text), shown=head + escape(_folded(text, len("error: "))), soft_wrap=True)


def _folded(text: str, used: int, indent: str = "") -> str:
    """In a terminal, ``text`` with line breaks between words; paths and what is quoted stay whole, to be copied.

    Args:
        used: columns that are taken in its first line.
        indent: what its other lines begin with.
    """
    if not console.is_terminal:
        return text
    folded, column = "", used
    for gap, word in re.findall(r"([ ]*)((?:[^\s']*=)?'[^'\n]*'\S*|\S+|\n)", text):
        if word == "\n":
            folded, column = f"{folded}\n", 0
        elif column > used and column + len(gap) + len(word) > console.width:
            folded, column = f"{folded}\n{indent}{word}", len(indent) + len(word)
        else:
            folded, column = f"{folded}{gap}{word}", column + len(gap) + len(word)
    return folded


@rank_zero_only
def print_files(folder: Path, files: Mapping[str, str]) -> None:
    """Prints the files that a run has left in its folder, each with what it holds."""
    for file, what in files.items():
        path = printable(f"  {folder / file}")
        folded = _folded(f"  {what}", len(path), " " * 4)
        _say(f"{escape(path)}  [dim]{what}", shown=f"{escape(path)}[dim]{folded}", soft_wrap=True)


@rank_zero_only
def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; the first column is left-aligned, the others right-aligned."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(_plain(column), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    _say(f"\n[bold]{_plain(title)}", soft_wrap=True)
    _say(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else _plain(value)


def _plain(value: object) -> str:
    """A text that neither a terminal nor Rich obeys."""
    return escape(printable(str(value)))


def duration(seconds: float) -> str:
    """``41 s``, ``3 min``, ``2 h 10 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
