"""Links of a report: to a run directory, its W&B page, and the papers of published numbers."""

import os
import re
from pathlib import Path
from urllib.parse import quote, urlsplit

from rld_lightning.runs.files import WANDB_RUN, read_json


def folder_link(folder: Path, page: Path) -> str:
    """A link to a run directory, relative to the page, so that both can be moved together."""
    return quote(os.path.relpath(folder.resolve(), page.resolve()) + "/")


def wandb_link(folder: Path) -> str | None:
    """The address of a run's W&B page; None if it was never online or has no safe address."""
    path = folder / WANDB_RUN
    if not path.exists():
        return None
    try:
        address = read_json(path)["url"]
        parts = urlsplit(address)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # The folder is untrusted: only web addresses, no scripts.
    safe = parts.scheme in ("http", "https") and parts.netloc and not re.search(r"[\s<>()\"'\\]", address)
    return address if safe else None


def paper_links(source: str) -> list[tuple[str, str]]:
    """The arXiv papers in a source's text, as ``("arXiv 2403.01427", "https://arxiv.org/abs/2403.01427")``."""
    numbers = re.findall(r"arXiv[:\s]\s*(\d{4}\.\d{4,5})", source)
    return [(f"arXiv {number}", f"https://arxiv.org/abs/{number}") for number in dict.fromkeys(numbers)]
