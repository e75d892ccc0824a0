"""What is wrong with a configuration or a run's folder, told before anything is loaded or computed."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig

from rld_lightning.data.sampler import share_of_batch
from rld_lightning.distributed import rank_zero_only
from rld_lightning.models.factory import create_model
from rld_lightning.models.facts import read_facts
from rld_lightning.runs.likeness import refuse_other_settings


def check_start(cfg: DictConfig, run: Path) -> None:
    """Looks whether a run can begin, or go on, in its folder, and whether its networks are known.

    Raises:
        FileNotFoundError: there is no checkpoint to resume from.
        ValueError: the folder holds another run, the checkpoint is not of this one, or a network has no name that is
            known.
    """
    last = run / "last.ckpt"
    goes_on = cfg.resume is not None and Path(cfg.resume).absolute() == last.absolute()
    if not goes_on and rank_zero_only.rank == 0 and any((run / name).exists() for name in ("metrics.csv", "last.ckpt")):
        raise ValueError(
            f"{run} holds a run already; choose another folder (hydra.run.dir), nothing is overwritten, or let it go "
            f"on (resume={last})."
        )
    if cfg.resume is not None:
        check_resume(cfg)
    for role in ("teacher", "student"):
        if cfg.model[role] is None:
            continue
        if cfg.model[role].name is None:
            raise ValueError(f"model.{role}.name has no value; name a model, such as model.{role}.name=resnet20.")
        if cfg.model[role].weights == "pretrained" and not cfg.model[role].name.startswith(("torchvision/", "timm/")):
            raise ValueError(
                f"model.{role}.weights=pretrained is for torchvision/<name> and timm/<name>, not for "
                f"{cfg.model[role].name}; give {'a file' if role == 'student' else 'a file, published or fit'}."
            )
        # A wrong name should not wait for a download. RegNets compute widths with tensors, which meta ones refuse.
        with torch.device("meta"), suppress(NotImplementedError):
            create_model(cfg.model[role].name)


def check_trainer(trainer: Trainer, cfg: DictConfig) -> None:
    """Looks whether a trainer can do all of a run.

    Raises:
        ValueError: it validates never, cannot share out the batch, or has no GPUs for what needs them.
    """
    if trainer.fast_dev_run:
        raise ValueError(
            "trainer.fast_dev_run leaves nothing that a run is made of; for a trial take trainer.max_steps=10 and "
            "data.subset=0.01."
        )
    if trainer.limit_val_batches == 0:
        raise ValueError(
            "trainer.limit_val_batches=0 leaves no accuracy to report; to validate less often, set "
            "trainer.check_val_every_n_epoch."
        )
    share_of_batch(cfg.data.batch_size, trainer.world_size)
    if cfg.trainer.get("sync_batchnorm") and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
        raise ValueError("trainer.sync_batchnorm=true needs GPUs: PyTorch's SyncBatchNorm does not run on a CPU.")


def check_resume(cfg: DictConfig) -> None:
    """Looks whether ``cfg.resume`` is a checkpoint of a run with the same settings, of which it may change the length.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, of another student or of other settings; or the run would be of another
            length and its schedule does not allow it.
    """
    path = Path(cfg.resume)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint to resume from at {path}.")
    checkpoint = _read(path)
    student = (read_facts(_hyper_parameters(checkpoint), path).name or "").split("@")[
        0
    ]  # SimKD's has the teacher's, too
    if student and student != cfg.model.student.name:
        raise ValueError(f"{path} is of a run with {student}, and this one trains {cfg.model.student.name}.")
    # One-cycle schedules have their length from the beginning.
    fixed = any(isinstance(schedule, dict) and "total_steps" in schedule for schedule in checkpoint["lr_schedulers"])
    length = () if fixed else ("recipe.epochs", "trainer.max_epochs", "trainer.max_steps")
    refuse_other_settings(path.parent, cfg, may_differ=(*length, "trainer.precision"))  # the machine's, by itself


def _read(path: Path) -> dict[str, Any]:
    weights = f"to begin a new run with its weights, use model.student.weights={path}"
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever a file that is no checkpoint is taken for
        raise ValueError(f"{path} is no checkpoint to resume from; take a run's last.ckpt, or {weights}.") from error
    if not isinstance(checkpoint, dict) or not checkpoint.get("optimizer_states"):
        raise ValueError(f"{path} has weights alone, no state of an optimizer; take a run's last.ckpt, or {weights}.")
    if not isinstance(checkpoint.get("lr_schedulers"), list):
        raise ValueError(f"{path} is no checkpoint to resume from; take a run's last.ckpt, or {weights}.")
    return checkpoint


def _hyper_parameters(checkpoint: dict[str, Any]) -> dict[str, str]:
    """What a checkpoint says about itself, as texts."""
    values = checkpoint.get("hyper_parameters")
    return {str(key): str(value) for key, value in values.items()} if isinstance(values, dict) else {}
