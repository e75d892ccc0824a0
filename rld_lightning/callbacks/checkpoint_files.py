"""Writes and reads the trainer's checkpoint files."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from rld_lightning.errors import UserError
from rld_lightning.models.weights.read import read_once
from rld_lightning.models.weights.seal import is_damaged
from rld_lightning.runs.checkpoint import read_checkpoint, snapshot, write_checkpoint


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints atomically with a checksum, keeps the previous one, and reads them as plain data.

    Lightning writes via the temporary directory and copies from there if it is on another disk: a process killed
    meanwhile leaves half a checkpoint and no other. Here a checkpoint with optimizer state, from which a run may have
    to resume, is kept as ``last.previous.ckpt`` until the next one is written, and read if the latest is damaged. Paths
    that are URLs of stores are handled by Lightning.

    Within :func:`write_in_background`, files are written by a thread while training goes on; whatever saves, reads or
    removes a checkpoint waits for it, and so does the end of the run, whatever ends it.
    """

    def __init__(self) -> None:
        self.in_background = False
        self._writing: Future[None] | None = None
        self._written: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint; Lightning calls this on one process only.

        Raises:
            UserError: it, or the previous one, cannot be written; the old file is unchanged.
        """
        self.wait()
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        elif self.in_background:
            thread = ThreadPoolExecutor(1, "checkpoint")
            self._writing = thread.submit(self._write, snapshot(checkpoint), Path(path))
            thread.shutdown(wait=False)  # ends once it has written
        else:
            self._write(checkpoint, Path(path))

    def wait(self) -> None:
        """Waits for the thread that may be writing a file.

        Raises:
            UserError: it could not be written.
        """
        if self._writing is not None:
            error = self._writing.exception()
            self._writing = None
            if error is not None:
                raise error

    def check(self) -> None:
        """Like :meth:`wait`, but returns at once if the thread is still writing."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def teardown(self) -> None:
        """Waits; Lightning calls this at the end of the run, whatever ends it."""
        self.wait()

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a file."""
        self.wait()
        super().remove_checkpoint(path)

    def _write(self, checkpoint: dict[str, Any], file: Path) -> None:
        try:
            write_checkpoint(checkpoint, file, keep=bool(checkpoint.get("optimizer_states")) and self._is_intact(file))
        except OSError as error:
            raise UserError(
                f"{file} cannot be written ({error.strerror or error}); what was there is as it was. Make room for it."
            ) from error
        self._written.add(file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint, or the previous one if it is damaged, without executing code.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged or no checkpoint, and there is no previous one.
        """
        self.wait()
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(Path(path), map_location)[0]

    def _is_intact(self, file: Path) -> bool:
        """Whether a file is intact; otherwise the previous one may be better and is kept."""
        return file in self._written or (file.is_file() and not is_damaged(read_once(file)))


@contextmanager
def write_in_background(trainer: Trainer) -> Iterator[None]:
    """Lets a thread write the checkpoints saved within the block, unless a logger may read each one as it is saved."""
    files = files_of(trainer)
    if files is not None:
        files.in_background = all(
            type(logger).after_save_checkpoint is Logger.after_save_checkpoint for logger in trainer.loggers
        )
    try:
        yield
    finally:
        if files is not None:
            files.in_background = False


def files_of(trainer: Trainer) -> CheckpointFiles | None:
    """Returns the trainer's checkpoint files; None if Lightning or a plugin writes them."""
    files = trainer.strategy.checkpoint_io
    return files if isinstance(files, CheckpointFiles) else None
