"""Writes and reads the trainer's checkpoint files."""

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from rld_lightning.errors import UserError
from rld_lightning.models.weights.read import read_once
from rld_lightning.models.weights.seal import is_damaged
from rld_lightning.runs.checkpoint import read_checkpoint, write_checkpoint


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints atomically with a checksum, keeps the previous one, and reads them as plain data.

    Lightning writes via the temporary directory and copies from there if it is on another disk: a process killed
    meanwhile leaves half a checkpoint and no other. Here a checkpoint with optimizer state, from which a run may have
    to resume, is kept as ``last.previous.ckpt`` until the next one is written, and read if the latest is damaged. Paths
    that are URLs of stores are handled by Lightning.
    """

    def __init__(self) -> None:
        self._written: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint; Lightning calls this on one process only.

        Raises:
            UserError: it cannot be written; the old file is unchanged.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
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
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(Path(path), map_location)[0]

    def _is_intact(self, file: Path) -> bool:
        """Whether a file is intact; otherwise the previous one may be better and is kept."""
        return file in self._written or (file.is_file() and not is_damaged(read_once(file)))
