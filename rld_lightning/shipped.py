"""Where the folders lie that come with the package, the configuration and the scripts, and how a script is called."""

import sys
from pathlib import Path
from shlex import quote

_PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """A folder that comes with the package: inside it where a wheel was installed, beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def invocation(script: str) -> list[str]:
    """How a script is called, for a command that is to be pasted: by its path, or by the command of an installed wheel.

    Args:
        script: ``sys.argv[0]``.
    """
    path = Path(script)
    return ["rld-lightning", path.stem] if path.parent == _PACKAGE / "scripts" else ["python", script]


def called(name: str) -> str:
    """How one of the scripts is called from here, for a line that says what to run next.

    Args:
        name: such as ``predict``.

    Returns:
        ``rld-lightning predict`` from an installed wheel; in a checkout ``python scripts/predict.py``, with the folder
        as it was written where one of the scripts is running.
    """
    scripts = shipped("scripts")
    running = Path(sys.argv[0])
    folder = running.parent if running.resolve().parent == scripts else Path("scripts")
    return " ".join(["rld-lightning", name] if scripts.parent == _PACKAGE else ["python", quote(f"{folder / name}.py")])
