"""What a run prints: the configuration as a tree, one line a part, a table at the end."""

import logging
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

from rld_lightning.distributed import rank_zero_only
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
)


@cache
def quiet_lightning() -> None:
    """Silences, once a process, what Lightning prints at every start and that says nothing about this run."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
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
                )
            )
        )
    )


@contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """Adds to a file what rank 0 prints, what Lightning tells, and what ends this, if it is an error.

    Args:
        path: the file, in a folder that is there.
    """
    if vars(rank_zero_only)["rank"]:
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
            kind = type(error).__name__
            whole = isinstance(error, Exception) and kind != "UserError"  # which is a sentence
            text = traceback.format_exc() if whole else f"error: {error}" if str(error) else kind
            file.write(f"{redact_text(text.rstrip())}\n")
            raise
        finally:
            lightning.removeHandler(handler)
            _copies.remove(file)


def _say(*objects: Any, width: int | None = None, **options: Any) -> None:
    (console if width is None else Console(width=width, highlight=False)).print(*objects, **options)
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
            _grow(tree.add(f"[cyan]{key}"), value)
        else:
            tree.add(f"[cyan]{key}[/]: {escape(str(value))}")


@rank_zero_only
def print_line(name: str, text: str) -> None:
    """Prints one line about a part of the run: ``name`` in a column of its own."""
    _say(f"[bold]{name:>8}[/]  {escape(redact_text(text))}", soft_wrap=True)


def print_error(text: str) -> None:
    """Prints what is wrong, for a user to put right; from whatever process has found it."""
    _say(f"[bold red]error:[/] {escape(redact_text(text))}", soft_wrap=True)


@rank_zero_only
def print_files(folder: Path, files: Mapping[str, str]) -> None:
    """Prints the files that a run has left in its folder, each with what it holds."""
    for file, what in files.items():
        _say(f"  {escape(str(folder / file))}  [dim]{what}", soft_wrap=True)


@rank_zero_only
def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; the first column is left-aligned, the others right-aligned."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    _say(f"\n[bold]{escape(title)}", soft_wrap=True)
    _say(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def duration(seconds: float) -> str:
    """``41 s``, ``3 min``, ``2 h 10 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
