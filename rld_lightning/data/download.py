"""Fetching a file so that what ends up under its name is complete and the one that was asked for."""

import hashlib
from http.client import HTTPException
from pathlib import Path

from rld_lightning.download import download


def file_md5(path: Path) -> str:
    """Return the MD5 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def fetch(url: str, target: Path, md5: str) -> None:
    """Download ``url`` to ``target``, continuing where an interrupted call stopped.

    The bytes are collected in ``<target>.part``, which is renamed only once its checksum is right.

    Args:
        url: What to download.
        target: Where to; its folder must exist.
        md5: The expected MD5.

    Raises:
        FileNotFoundError: If the server cannot be reached, lacks the file or stops before its end.
        ValueError: If the file has another MD5 than expected.
    """
    part = target.with_name(target.name + ".part")
    by_hand = f"You can also get the file by other means and place it at {target}."
    try:
        download(url, part)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(f"Downloading {url} to {target} failed: {error}. {by_hand}") from error
    if (found := file_md5(part)) != md5:
        part.unlink()
        raise ValueError(f"{url} has MD5 {found} instead of {md5} and was discarded. {by_hand}")
    part.replace(target)
