"""Prints a run's configuration as a tree, one line per part, and a table at the end."""

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

from rld_lightning.distributed import Stopped, is_rank_zero, rank_zero_only
from rld_lightning.errors import UserError, printable
from rld_lightning.redact import redact, redact_text

console = Console(highlight=False)
_log_files: list[TextIO] = []  # log files that also receive what is printed, see `copy_output_to`
_PACKAGE = Path(__file__).parent
_WIDE = 1000  # columns for text that Rich would crop at the console's width and that users copy
_LONGEST = 5000  # characters of an error that are printed

# Messages that repeat a run's own lines, or describe what is by design: checkpoints, metrics and configuration share
# the run directory, and values logged at the end of an epoch are already the same on all ranks.
_NOISE = (
    "It is recommended to use `self.log.*sync_dist=True.*",
    ".*treespec, LeafSpec.*",
    "Experiment logs directory .* exists and is not empty.*",
    "Checkpoint directory .* exists and is not empty.*",
    "The number of training batches .* is smaller than the logging interval.*",
    "The ``compute`` method of metric .* was called before the ``update`` method.*",  # it was restored
    ".*does not have many workers which may be a bottleneck.*",
    "This DataLoader will create .* worker processes in total.*",  # data.num_workers; a store keeps many workers busy
)


def reset_console() -> None:
    """Detects the output stream again, in a forked process that prints elsewhere."""
    vars(console).update(vars(Console(highlight=False)))


@cache
def quiet_lightning() -> None:
    """Silences, once per process, what libraries print at a start and that is not specific to this run."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells at its first use that it has listed the fonts
    logging.getLogger("lightning").propagate = False  # it has its own handler; Hydra's root logger would repeat it
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


def print_messages_as_lines() -> None:
    """Prints log messages and Python's warnings like other lines, and not in the formats of Hydra and Python.

    The log file of Hydra, if there is one, keeps its format, which has the time.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) in (logging.StreamHandler, _Lines)]:
        root.removeHandler(handler)
    root.addHandler(_Lines(copied=not any(isinstance(handler, logging.FileHandler) for handler in root.handlers)))
    warnings.showwarning = _log_warning  # type: ignore[assignment]  # it needs no more arguments


class _Lines(logging.Handler):
    """Prints log messages of any rank.

    Args:
        copied: whether our log files receive them, too.
    """

    def __init__(self, *, copied: bool) -> None:
        super().__init__()
        self.copied = copied

    def emit(self, record: logging.LogRecord) -> None:
        name = "caution" if record.levelno >= logging.WARNING else "note"
        for line in self.format(record).splitlines():
            _print_line(name, line, copied=self.copied)
            name = ""


def _log_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    path = Path(filename)
    place = "" if path.is_relative_to(_PACKAGE) else f" ({path.parent.name}/{path.name}:{lineno})"
    logging.getLogger("py.warnings").warning("%s%s", message, place)


@contextmanager
def copy_output_to(path: Path) -> Iterator[None]:
    """Appends to a file what rank 0 prints, Lightning's messages, and the error that ends the block, if any."""
    if not is_rank_zero():
        yield
        return
    with path.open("a", buffering=1) as file:
        handler = logging.StreamHandler(file)
        lightning = logging.getLogger("lightning.pytorch")
        _log_files.append(file)
        lightning.addHandler(handler)
        try:
            yield
        except BaseException as error:
            file.write(f"{printable(redact_text(_error_text(error).rstrip()))}\n")
            raise
        finally:
            lightning.removeHandler(handler)
            _log_files.remove(file)


def _error_text(error: BaseException) -> str:
    """Describes for the log what ended a run: a user error's sentence, a signal, or a traceback."""
    if isinstance(error, Stopped):
        return f"ended by {error.signal.name}"
    if isinstance(error, Exception) and not isinstance(error, UserError):
        return traceback.format_exc()
    return f"error: {error}" if str(error) else type(error).__name__


def _print(
    *objects: Any, width: int | None = None, shown: str | None = None, copied: bool = True, **options: Any
) -> None:
    screen = console if width is None else Console(width=width, highlight=False)
    screen.print(*(objects if shown is None else [shown]), **options)
    for file in _log_files if copied else ():
        copy = Console(file=file, width=width or 120, highlight=False, color_system=None)
        copy.print(*objects, **options)


@rank_zero_only
def print_config(cfg: DictConfig) -> None:
    """Prints the resolved configuration as a tree, without secrets."""
    tree = Tree("[bold]configuration")
    values: Any = redact(OmegaConf.to_container(cfg, resolve=True))
    _add_branches(tree, values)
    _print(tree, width=_WIDE)


def _add_branches(tree: Tree, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            _add_branches(tree.add(f"[cyan]{_escaped(key)}"), value)
        else:
            tree.add(f"[cyan]{_escaped(key)}[/]: {_escaped(value)}")


@rank_zero_only
def print_line(name: str, text: str, *, pasted: bool = False) -> None:
    """Prints one line about a part of the run: ``name`` in its own column, then the text.

    In a terminal the line is wrapped between words, unless it is ``pasted`` into a command line.
    """
    _print_line(name, text, pasted=pasted)


def _print_line(name: str, text: str, *, pasted: bool = False, copied: bool = True) -> None:
    text = printable(redact_text(text)).replace("\n", "\\n")  # a name with a line break would print a second line
    head, wrapped = f"[bold]{name:>8}[/]  ", text if pasted else _wrapped(text, max(len(name), 8) + 2, " " * 10)
    _print(head + escape(text), shown=head + escape(wrapped), copied=copied, soft_wrap=True)


def start_new_line() -> None:
    """Starts a new line in a terminal that has echoed ``^C``, possibly behind a progress bar."""
    if console.is_terminal:
        console.print()


def print_error(text: str) -> None:
    """Prints a user error, on any rank."""
    text = _shortened(printable(redact_text(text)))
    head = "[bold red]error:[/] "
    _print(head + escape(text), shown=head + escape(_wrapped(text, len("error: "))), soft_wrap=True)


def _shortened(text: str) -> str:
    """Leaves out the middle of a text that fills screens, with a value from a file; the way out is at its end."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1000]} ... {text[-1000:]}"


def _wrapped(text: str, used: int, indent: str = "") -> str:
    """Wraps ``text`` between words if this is a terminal; keeps paths and quoted text whole, for copying.

    Args:
        used: columns already used in the first line.
        indent: indentation of the other lines.
    """
    if not console.is_terminal:
        return text
    wrapped, column = "", used
    for gap, word in re.findall(r"([ ]*)((?:[^\s']*=)?'[^'\n]*'\S*|\S+|\n)", text):
        if word == "\n":
            wrapped, column = f"{wrapped}\n", 0
        elif column > used and column + len(gap) + len(word) > console.width:
            wrapped, column = f"{wrapped}\n{indent}{word}", len(indent) + len(word)
        else:
            wrapped, column = f"{wrapped}{gap}{word}", column + len(gap) + len(word)
    return wrapped


@rank_zero_only
def print_files(folder: Path, files: Mapping[str, str]) -> None:
    """Prints the files that a run has written to its directory, each with its description."""
    for file, what in files.items():
        path = printable(f"  {folder / file}")
        wrapped = _wrapped(f"  {what}", len(path), " " * 4)
        _print(f"{escape(path)}  [dim]{what}", shown=f"{escape(path)}[dim]{wrapped}", soft_wrap=True)


@rank_zero_only
def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; the first column is left-aligned, the others right-aligned."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(_escaped(column), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    _print(f"\n[bold]{_escaped(title)}", soft_wrap=True)
    _print(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else _escaped(value)


def _escaped(value: object) -> str:
    """Escapes a value's text for terminals and for Rich."""
    return escape(printable(str(value)))


def duration(seconds: float) -> str:
    """Formats a duration: ``41 s``, ``3 min``, ``2 h 10 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
