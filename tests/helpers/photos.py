"""Folders of small images."""

from pathlib import Path

from PIL import Image


def grow(root: Path, names: tuple[str, ...], count: int = 10, start: int = 0) -> None:
    """Adds images to class folders, with names that need quotes in a CSV file."""
    for name in names:
        for number in range(start, start + count):
            path = root / name / f"{number:03d}, a.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
