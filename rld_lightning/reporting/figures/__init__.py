"""The figures of the RLD paper, drawn from finished runs. A new figure is one file here that registers it."""

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
    """A figure that ``scripts/figures.py`` can draw."""

    name: str  # of the command
    summary: str  # its contents, in a few words
    # Writes its files and returns their paths. Its parameters are those it needs of: the folder `out`, the finished
    # `runs` (`runs_frame`), the name of a `pair` among several, and a `LogitSource` as `reader`.
    write: WriteFigure
    add_options: Callable[[argparse.ArgumentParser], None]  # adds its other options to the command

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of ``write``."""
        return inspect.signature(self.write).parameters


def register_figure(
    name: str, summary: str, add_options: Callable[[argparse.ArgumentParser], None] = lambda _: None
) -> Callable[[WriteFigure], WriteFigure]:
    """Decorator that registers a function for ``scripts/figures.py <name>``, see :class:`RegisteredFigure`.

    Raises:
        ValueError: the name is already registered.
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
    """Writes every figure that these runs suffice for, and prints why others are left out.

    Returns:
        the paths of the files.
    """
    files = []
    for figure in list_figures():
        given = {"runs": runs, "reader": reader}
        try:
            files += figure.write(out, **{name: value for name, value in given.items() if name in figure.parameters})
        except (ValueError, OSError) as error:
            print_line("left out", f"{figure.name}: {error}")
    return files
