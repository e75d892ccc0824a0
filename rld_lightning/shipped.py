"""Where the folders lie that come with the package: the configuration and the scripts."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """A folder that comes with the package: inside it where a wheel was installed, beside it in a checkout.

    Args:
        name: such as ``conf``.
    """
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def invocation(script: str) -> list[str]:
    """How a script is called, for a command that is to be pasted: by its path, or by the command of an installed wheel.

    Args:
        script: ``sys.argv[0]``.
    """
    path = Path(script)
    return ["rld-lightning", path.stem] if path.parent == _PACKAGE / "scripts" else ["python", script]
