"""What a run leaves behind: a folder that explains itself."""

import json
import platform
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from rld_lightning.config import started_by
from rld_lightning.console import print_files, print_table
from rld_lightning.data.base import ImageDataModule
from rld_lightning.errors import UserError, user_errors
from rld_lightning.loggers import wandb_facts
from rld_lightning.models.weights import save_weights
from rld_lightning.reporting.cost import processor_name
from rld_lightning.reporting.curves import plot_curves
from rld_lightning.reporting.runs import Summary, differences

EARLIER = "metrics_earlier.csv"  # of a run that goes on in its own folder


@rank_zero_only
def leave_results(run: Path, summary: Summary, data: ImageDataModule, student: nn.Module) -> None:
    """Writes summary, student and curves, and prints the summary as a table."""
    summary.write(run)
    facts = {
        "name": summary.model,
        "dataset": summary.dataset,
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "image_shape": list(data.image_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "loss": summary.loss,
        "top1": summary.top1,
        "epochs": summary.epochs,
        "seed": summary.seed,
        **data.split_facts,
        "source": "fit",
        **wandb_facts(run),
    }
    save_weights(student, run / "student.safetensors", facts)
    teacher = f" from {summary.teacher}" if summary.teacher else ""
    plot_curves(run, f"{summary.model}{teacher}, {summary.loss}, {summary.dataset}, seed {summary.seed}")
    rows = [
        ("top-1, last epoch", f"{summary.top1:.2f} %"),
        ("top-1, best epoch", f"{summary.top1_best:.2f} %"),
        ("top-5, last epoch", f"{summary.top5:.2f} %" if summary.top5 is not None else None),
        ("teacher top-1", f"{summary.teacher_top1:.2f} %" if summary.teacher_top1 is not None else None),
        ("agreement with teacher", f"{summary.agreement:.2f} %" if summary.agreement is not None else None),
        ("training speed", f"{summary.images_per_s:,.0f} images/s" if summary.images_per_s else None),
    ]
    print_table(
        f"{summary.model}{teacher}, {summary.loss}, {summary.dataset} (validated on {summary.validated_on})",
        ("", "student"),
        [row for row in rows if row[1]],
    )
    files = {
        "student.safetensors": "the student's weights",
        "summary.json": "these numbers",
        "metrics.csv": "every logged value",
        "classes.csv": "accuracy of each class",
        "curves.png": "learning curves",
    }
    print_files(run, {name: what for name, what in files.items() if (run / name).exists()})


@rank_zero_only
def write_provenance(run: Path, cfg: DictConfig) -> None:
    """Leaves the resolved configuration and the versions that the run used."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "platform": platform.platform(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
    (run / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


@rank_zero_only
def keep_metrics(run: Path, resume: str | None) -> None:
    """Before a run goes on in its own folder: saves what was logged there from the logger, which begins a new file."""
    if not _in_place(run, resume) or not (run / "metrics.csv").exists():
        return
    join_metrics(run, resume)  # of an attempt that was killed
    (run / "metrics.csv").rename(run / EARLIER)


@rank_zero_only
def join_metrics(run: Path, resume: str | None) -> None:
    """Puts what was logged before the checkpoint in front, so that a resumed run tells the whole story."""
    if resume is None:
        return
    before = run / EARLIER if _in_place(run, resume) else Path(resume).parent / "metrics.csv"
    if not before.exists():
        return
    if (run / "metrics.csv").exists():
        now = pd.read_csv(run / "metrics.csv")
        earlier = pd.read_csv(before)
        pd.concat([earlier[earlier["step"] < now["step"].min()], now]).to_csv(run / "metrics.csv", index=False)
        if _in_place(run, resume):
            before.unlink()
    elif _in_place(run, resume):
        before.rename(run / "metrics.csv")


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Keeps a run's folder to this process and those that it starts; does nothing in one of a group.

    Raises:
        UserError: another process trains in it.
    """
    lock = lock_folder(run, ".lock", "trained")
    try:
        yield
    finally:
        lock.release()


def lock_folder(folder: Path, name: str, what: str) -> FileLock:
    """Locks a folder, which it makes, until the lock is released or this process ends.

    Args:
        folder: the folder.
        name: of the lock's file in it.
        what: is done there: "trained" or "swept".

    Returns:
        the lock; in one of a group of processes it is not taken.

    Raises:
        UserError: another process has taken it.
    """
    lock = FileLock(folder / name)
    if started_by() is not None:
        return lock
    try:
        with user_errors():
            folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder} is being {what} in by another process; wait for it, end it, or choose another folder."
        ) from None
    return lock


def refuse_other_settings(run: Path, cfg: DictConfig, *, may_differ: Collection[str] = ()) -> None:
    """Looks whether a folder that has a run is this run's.

    Args:
        run: the folder; one without a run suits any.
        cfg: the run's configuration.
        may_differ: settings that may be others.

    Raises:
        ValueError: a setting is another one.
    """
    if not (run / "config.yaml").exists():
        return
    there = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    here = OmegaConf.to_container(cfg, resolve=True)
    teachers = here["model"]["teacher"], there["model"]["teacher"]
    if all(teachers) and teachers[0]["weights"] in ("auto", "fit", "published"):
        teachers[0]["weights"] = teachers[1]["weights"]  # which file that was
    changed = {key: values for key, values in differences(there, here).items() if key not in may_differ}
    if changed:
        key, (before, now) = next(iter(changed.items()))
        raise ValueError(
            f"{run} holds a run with {key}={before}, and this one has {key}={now}: continue it with the command that "
            "began it, or begin another run in another folder."
        )


def _in_place(run: Path, resume: str | None) -> bool:
    return resume is not None and Path(resume).absolute().parent == run.absolute()
