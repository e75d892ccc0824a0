"""The command ``rld-lightning``: ``rld-lightning fit ...`` is ``python scripts/fit.py ...``, without a checkout."""

import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C ends the other imports, too)

import ast
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import ModuleType

from rld_lightning import __version__
from rld_lightning.errors import did_you_mean
from rld_lightning.shipped import shipped

PROGRAM = "rld-lightning"
_HELP = {"-h", "--help"}
_COMPLETION = "-sc"  # as in Hydra's scripts
_CONFIG_DIR = re.compile(r"(-cd|--config-dir)[ =](\S+) ")
_ENDING = f"""
  {PROGRAM} fit experiment=folder data.root=/photos   from a folder of photographs to a small model
  {PROGRAM} COMMAND --help               its options
  {PROGRAM} fit --config-dir FOLDER ...  add your own configurations: FOLDER/model/mine.yaml is model=mine
  eval "$({PROGRAM} -sc install=bash)"   tab completion of commands and options

{PROGRAM} NAME is the same as python scripts/NAME.py in the manual."""


def main() -> None:
    """Runs the script that the command line names first.

    Exits with 2 where there is none of this name.
    """
    words = sys.argv[1:]
    scripts = commands()
    if words and words[0] in scripts:
        _see_own_modules()
        path = scripts[words[0]]
        with _said_as_called(scripts) if _HELP & {*words} else nullcontext():
            run_script(path, str(path), words[1:])  # by its path it can be started again, for another process
    elif words[:1] == [_COMPLETION]:
        _complete(scripts, words)
    elif words in (["-V"], ["--version"]):
        print(PROGRAM, __version__)
    elif not words or words[0] in _HELP:
        print(f"usage: {PROGRAM} COMMAND ...\n")
        for name, path in scripts.items():
            print(f"  {name:12}{_summary(path)}")
        print(_ENDING)
    else:
        print(
            f"error: {words[0]} is not a command.{did_you_mean(words[0], scripts)} Choose one of {', '.join(scripts)}."
        )
        sys.exit(2)


def commands() -> dict[str, Path]:
    """The scripts by their names: whatever lies in their folder."""
    return {path.stem: path for path in sorted(shipped("scripts").glob("*.py"))}


def run_script(path: Path, called: str, arguments: Sequence[str]) -> None:
    """Runs a script in this process as Python does when it is given its path."""
    module = ModuleType("__main__")
    module.__file__ = str(path)
    sys.modules["__main__"] = module
    sys.argv = [called, *arguments]
    exec(compile(path.read_bytes(), path, "exec"), vars(module))


@contextmanager
def _said_as_called(scripts: Iterable[str]) -> Iterator[None]:
    """Has a script's help, which is that of a checkout, name the commands of an installed wheel."""
    held = io.StringIO()
    try:
        with redirect_stdout(held):
            yield
    finally:
        named = rf"(?:python\s+)?(?:[^\s`]*/)?\b({'|'.join(scripts)})\.py\b"
        print(re.sub(named, rf"{PROGRAM} \1", held.getvalue()), end="")


def _see_own_modules() -> None:
    """Has this process and its children find modules in the current folder, behind all others.

    A configuration of a user's own names classes of their own by import path.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), here]))


def _complete(scripts: dict[str, Path], words: Sequence[str]) -> None:
    """Answers what shells ask by Hydra's scripts for completion, which ask a program and not one of its commands."""
    line = os.environ.get("COMP_LINE", "")
    program, _, rest = line.partition(" ")
    name, space, _ = rest.partition(" ")
    if not any(word.startswith("query=") for word in words):  # install=bash: Hydra's script, for this program
        run_script(scripts["fit"], PROGRAM, words)
    elif not space:
        print(" ".join(scripts))
    elif name in scripts and "run_task" in scripts[name].read_text():  # the others are not Hydra's
        # Hydra completes what stands on the line, and looks for it in the folders that it is called with itself.
        folders = [f"--config-dir={found[2]}" for found in _CONFIG_DIR.finditer(rest)]
        os.environ["COMP_LINE"] = _CONFIG_DIR.sub("", rest)
        run_script(scripts[name], program, [*words, *folders])


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_bytes())) or ""
    return re.split(r"[:.;](?= )|\n", text)[0].rstrip(".")


if __name__ == "__main__":
    main()
