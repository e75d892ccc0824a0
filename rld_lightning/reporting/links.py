"""Where a report's reader can go on: to a run's folder, to its page in W&B, to the paper of a number."""

import os
import re
from pathlib import Path
from urllib.parse import quote, urlsplit

from rld_lightning.runs.files import WANDB_RUN, read_json


def folder_link(folder: Path, page: Path) -> str:
    """A run's folder as a page's link, relative to the page, so that both may move together."""
    try:
        return quote(Path(os.path.relpath(folder.resolve(), page.resolve())).as_posix() + "/")
    except ValueError:  # another drive
        return folder.resolve().as_uri()


def wandb_link(folder: Path) -> str | None:
    """The address of a run's page in W&B; None where it was never online, or says no address."""
    path = folder / WANDB_RUN
    if not path.exists():
        return None
    try:
        address = read_json(path)["url"]
        parts = urlsplit(address)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # The folder may be anybody's: a link is to a page, and runs nothing.
    safe = parts.scheme in ("http", "https") and parts.netloc and not re.search(r"[\s<>()\"'\\]", address)
    return address if safe else None


def paper_links(source: str) -> list[tuple[str, str]]:
    """The papers on arXiv that a source names, as ``("arXiv 2403.01427", "https://arxiv.org/abs/2403.01427")``."""
    found = re.findall(r"arXiv[:\s]\s*(\d{4}\.\d{4,5})", source)
    return [(f"arXiv {number}", f"https://arxiv.org/abs/{number}") for number in dict.fromkeys(found)]
