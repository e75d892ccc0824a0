"""How a trainer's checkpoints become files."""

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from rld_lightning.errors import UserError
from rld_lightning.models.weights.read import read_once
from rld_lightning.models.weights.seal import is_damaged
from rld_lightning.runs.checkpoint import read_checkpoint, write_checkpoint


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints beside their place, with a checksum, and keeps the one before; reads them as data.

    Lightning writes them by way of the folder for temporary files, from where they are copied if it is on another disk:
    a process that is killed meanwhile leaves half a checkpoint and no other. Here one with the state of an optimizer,
    which a run may have to go on from, stays as ``last.previous.ckpt`` until the next one, and is read where the latest
    is damaged. Addresses of stores are left to Lightning.
    """

    def __init__(self) -> None:
        self._written: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint; of several processes Lightning asks one.

        Raises:
            UserError: it cannot be written; what was there is untouched.
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
        """Reads a checkpoint, or the one before it where it is damaged, without executing anything.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or none, and there is no other before it.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(Path(path), map_location)[0]

    def _is_intact(self, file: Path) -> bool:
        """Whether a file is worth keeping: what was kept before it may be better."""
        return file in self._written or (file.is_file() and not is_damaged(read_once(file)))
