"""Checks before training that the disk has room for a run's files."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor
from torch.optim import SGD

from rld_lightning.distributed import rank_zero_only
from rld_lightning.module import DistillationModule
from rld_lightning.runs.checkpoint import previous_of
from rld_lightning.runs.files import STUDENT
from rld_lightning.trainer_callbacks import callbacks_of

# Bytes for metrics, curves and the like, and for the contents of checkpoints other than tensors.
_OTHERS = 2_000_000


@rank_zero_only
def check_disk_space(run: Path, trainer: Trainer, module: DistillationModule) -> None:
    """Refuses a run whose checkpoints and student do not fit on the disk.

    Raises:
        ValueError: there is not enough room.
    """
    folder = next(path for path in (run, *run.absolute().parents) if path.is_dir())
    need, free = bytes_needed(run, trainer, module), shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(
            f"the disk of {run} has {free / 1e6:,.0f} MB free, and the checkpoints and the student of the run take "
            f"{need / 1e6:,.0f} MB: make room, or choose another folder with hydra.run.dir=."
        )


def bytes_needed(run: Path, trainer: Trainer, module: DistillationModule) -> int:
    """Returns how many bytes a run adds to its directory.

    Each checkpoint is written before the one that it replaces is removed. Checkpoints for resuming contain the
    optimizer's state, and the previous one is kept.
    """
    weights = _bytes_of(module.state_dict().values())
    whole = weights + _state_of_optimizer(module)
    if callbacks_of(trainer, WeightAveraging):
        whole += weights  # the trained weights, in addition to their average
    files = [(run / STUDENT, weights)]
    largest = weights
    for callback in callbacks_of(trainer, ModelCheckpoint):
        if callback.dirpath is None or "://" in str(callback.dirpath):
            continue
        size = weights if callback.save_weights_only else whole
        largest = max(largest, size)
        last = Path(callback.dirpath) / f"{callback.filename or callback.CHECKPOINT_NAME_LAST}.ckpt"
        files.append((last, size))
        if not callback.save_weights_only:
            files.append((previous_of(last), size))
    there = sum(path.stat().st_size for path, _ in files if path.is_file())
    return max(0, sum(size for _, size in files) - there) + largest + _OTHERS


def _state_of_optimizer(module: DistillationModule) -> int:
    """Estimates the optimizer state's bytes: a momentum for SGD, and two moments for any other optimizer."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = module.make_optimizer(trained)
    copies = 2
    if isinstance(optimizer, SGD):
        copies = int(any(group["momentum"] for group in optimizer.param_groups))
    return copies * _bytes_of(trained)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
