"""The package's version, the places of its configuration and scripts, and the commands that call the scripts."""

import sys
from pathlib import Path
from shlex import quote

__version__ = "0.1.0"
PROGRAM = "rld-lightning"  # the command of an installed wheel
_PACKAGE = Path(__file__).resolve().parent


def package_folder(name: str) -> Path:
    """Returns a folder that ships with the package: inside it in an installed wheel, beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def invocation(script: str) -> list[str]:
    """Returns the words that call a script, for pasting: by its path, or by the command of an installed wheel.

    Args:
        script: ``sys.argv[0]``.
    """
    path = Path(script)
    return [PROGRAM, path.stem] if path.parent == _PACKAGE / "scripts" else ["python", script]


def script_command(name: str) -> str:
    """Returns the command that calls a script from here, for messages that name the next step.

    Args:
        name: such as ``predict``.

    Returns:
        ``rld-lightning predict`` in an installed wheel; ``python scripts/predict.py`` in a checkout, with the folder as
        the user wrote it if a script is running.
    """
    scripts = package_folder("scripts")
    running = Path(sys.argv[0])
    folder = running.parent if running.resolve().parent == scripts else Path("scripts")
    return " ".join([PROGRAM, name] if scripts.parent == _PACKAGE else ["python", quote(f"{folder / name}.py")])
