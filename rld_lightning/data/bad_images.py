"""Reports image files that cannot be read, each once."""

import fcntl
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rld_lightning.errors import printable

BAD_IMAGES = ("replace", "error")
MOST_LOGGED = 20

logger = logging.getLogger(__name__)


class BadImage(NamedTuple):
    """A file that cannot be read, and the reason."""

    path: str
    reason: str


def _printable(image: BadImage) -> BadImage:
    """Returns path and reason as single lines without control characters."""
    return BadImage(printable(image.path).replace("\n", "\\n"), printable(image.reason))


class BadImageReport:
    """Logs each bad image once over all workers, epochs and processes.

    Workers pass bad images to their training process, which reports them here. The processes of a run share a file of
    ``path<TAB>reason`` lines, which is also the list for the user. If there is a file, only the first ``MOST_LOGGED``
    are logged individually.

    Args:
        file: lists the images; with ``None`` there is no list, and each process reports separately.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.known: set[str] = set()

    def add(self, images: Iterable[BadImage], consequence: str) -> None:
        """Reports the images that were not reported yet.

        Args:
            images: the bad images.
            consequence: how they are handled, which ends the message.
        """
        new = {image.path: image for image in map(_printable, images) if image.path not in self.known}
        if not new:
            return
        if self.file is not None:
            new = self._enter(self.file, new)
        for image in new.values():
            self.known.add(image.path)
            if self.file is None or len(self.known) <= MOST_LOGGED:
                logger.warning("%s cannot be read as an image (%s): %s", *image, consequence)
            elif len(self.known) == MOST_LOGGED + 1:
                logger.warning("More than %d images cannot be read: see %s", MOST_LOGGED, self.file)

    def _enter(self, file: Path, new: dict[str, BadImage]) -> dict[str, BadImage]:
        """Appends the images that no process has listed yet to the file, and returns them."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+", errors="surrogateescape") as list_file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(list_file, fcntl.LOCK_EX)  # until it is closed
            list_file.seek(0)
            self.known.update(line.split("\t")[0] for line in list_file.read().splitlines())
            new = {path: image for path, image in new.items() if path not in self.known}
            list_file.writelines(f"{path}\t{' '.join(reason.split())}\n" for path, reason in new.values())
        return new
