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
