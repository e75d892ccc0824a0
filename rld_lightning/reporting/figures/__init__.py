"""The figures of the RLD paper, drawn from finished runs: a file here that registers one is all that a new one is."""

import argparse
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rld_lightning.console import print_line
from rld_lightning.reporting.logits import LogitSource

if TYPE_CHECKING:
    import pandas as pd

WriteFigure = Callable[..., list[Path]]
_FIGURES: dict[str, "RegisteredFigure"] = {}


@dataclass(frozen=True)
class RegisteredFigure:
    """A figure as ``scripts/figures.py`` offers it."""

    name: str  # of the command
    summary: str  # what it shows, in a few words
    # Writes its files: `write(out, runs, ...)`. `out` is the folder, `runs` finished runs as `runs_frame` has them,
    # `pair` which of several pairs, `reader` a `LogitSource`; of these it takes what it needs.
    write: WriteFigure
    add_options: Callable[[argparse.ArgumentParser], None]  # adds what else it takes to its command

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What ``write`` takes."""
        return inspect.signature(self.write).parameters


def register_figure(
    name: str, summary: str, add_options: Callable[[argparse.ArgumentParser], None] = lambda _: None
) -> Callable[[WriteFigure], WriteFigure]:
    """Decorator: ``scripts/figures.py <name>`` calls the function, see :class:`RegisteredFigure`.

    Raises:
        ValueError: the name is taken.
    """

    def register(write: WriteFigure) -> WriteFigure:
        if name in _FIGURES:
            raise ValueError(f"figure {name!r} is already registered, by {_FIGURES[name].write.__module__}.")
        _FIGURES[name] = RegisteredFigure(name, summary, write, add_options)
        return write

    return register


def list_figures() -> list[RegisteredFigure]:
    """All figures, by name."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        import_module(module.name)
    return [_FIGURES[name] for name in sorted(_FIGURES)]


def write_all(out: Path, runs: "pd.DataFrame", *, reader: LogitSource) -> list[Path]:
    """Every figure that some runs suffice for; says why where they do not.

    Returns:
        the files.
    """
    files = []
    for figure in list_figures():
        given = {"runs": runs, "reader": reader}
        try:
            files += figure.write(out, **{name: value for name, value in given.items() if name in figure.parameters})
        except (ValueError, OSError) as error:
            print_line("left out", f"{figure.name}: {error}")
    return files
