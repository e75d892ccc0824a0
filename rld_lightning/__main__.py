"""The command ``rld-lightning``: ``rld-lightning fit ...`` runs ``scripts/fit.py ...`` without a checkout."""

import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C during other imports is handled)

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
from rld_lightning.package_files import PROGRAM, package_folder

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
    """Runs the script that the first argument names.

    Exits with status 2 if there is no such script.
    """
    words = sys.argv[1:]
    scripts = commands()
    if {"-V", "--version"} & {*words}:
        print(PROGRAM, __version__)
    elif words and words[0] in scripts:
        _import_from_working_folder()
        path = scripts[words[0]]
        with _installed_commands_in_help(scripts) if _HELP & {*words} else nullcontext():
            run_script(path, str(path), words[1:])  # by its path, so that further processes can start it
    elif words[:1] == [_COMPLETION]:
        _complete(scripts, words)
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
    """Returns the scripts by name: all files of their folder."""
    return {path.stem: path for path in sorted(package_folder("scripts").glob("*.py"))}


def run_script(path: Path, called: str, arguments: Sequence[str]) -> None:
    """Runs a script in this process as ``python PATH`` would."""
    module = ModuleType("__main__")
    module.__file__ = str(path)
    sys.modules["__main__"] = module
    sys.argv = [called, *arguments]
    exec(compile(path.read_bytes(), path, "exec"), vars(module))


@contextmanager
def _installed_commands_in_help(scripts: Iterable[str]) -> Iterator[None]:
    """Replaces, in a script's help, the commands of a checkout by those of an installed wheel."""
    held = io.StringIO()
    try:
        with redirect_stdout(held):
            yield
    finally:
        named = rf"(?:python\s+)?(?:[^\s`]*/)?\b({'|'.join(scripts)})\.py\b"
        print(re.sub(named, rf"{PROGRAM} \1", held.getvalue()), end="")


def _import_from_working_folder() -> None:
    """Appends the current folder to the import path of this process and its children.

    User configurations refer to the user's classes by import path.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), here]))


def _complete(scripts: dict[str, Path], words: Sequence[str]) -> None:
    """Answers the completion queries of Hydra's shell scripts, which address the program and not its subcommands."""
    line = os.environ.get("COMP_LINE", "")
    program, _, rest = line.partition(" ")
    name, space, _ = rest.partition(" ")
    if not any(word.startswith("query=") for word in words):  # install=bash: Hydra's script, for this program
        run_script(scripts["fit"], PROGRAM, words)
    elif not space:
        print(" ".join(scripts))
    elif name in scripts and "run_task" in scripts[name].read_text():  # the others do not use Hydra
        # Hydra completes the text of the line, and searches the config folders that it is called with itself.
        folders = [f"--config-dir={match[2]}" for match in _CONFIG_DIR.finditer(rest)]
        os.environ["COMP_LINE"] = _CONFIG_DIR.sub("", rest)
        run_script(scripts[name], program, [*words, *folders])


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_bytes())) or ""
    return re.split(r"[:.;](?= )|\n", text)[0].rstrip(".")


if __name__ == "__main__":
    main()
