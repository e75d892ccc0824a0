"""Trains a student, with or without a teacher, and leaves a run folder that explains itself."""

import json
import platform
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from rld_lightning.console import console, print_config, print_line, print_table
from rld_lightning.data.base import ImageDataModule
from rld_lightning.errors import user_errors
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.models.complexity import count_macs, count_parameters
from rld_lightning.models.factory import create_model
from rld_lightning.models.store import TeacherStore, resolve_teacher_weights
from rld_lightning.models.teacher import FrozenTeacher
from rld_lightning.models.weights import load_weights, save_weights
from rld_lightning.module import DistillationModule
from rld_lightning.reporting.curves import plot_curves


@dataclass(frozen=True)
class Summary:
    """What a finished run came to; written as ``summary.json``. Accuracy in percent.

    ``top1`` is the last epoch's, ``top1_best`` the best epoch's, on ``validated_on``; tables in the literature print
    the best epoch on the test split.
    """

    model: str
    loss: str
    dataset: str
    validated_on: str
    epochs: int
    seed: int
    top1: float
    top1_best: float
    top5: float | None
    ce: float
    teacher: str | None
    teacher_top1: float | None
    agreement: float | None
    parameters: int
    macs: int
    images_per_s: float | None
    run: str


def fit(cfg: DictConfig) -> Summary:
    """Runs the whole job that ``conf/fit.yaml`` describes.

    Args:
        cfg: the composed configuration.

    Returns:
        the summary; on ranks other than 0 as well.

    Raises:
        UserError: something in the configuration or the files it names is wrong; raised before training starts.
    """
    run = Path(cfg.paths.run)
    with user_errors():
        _refuse_used_folder(run)
        seed_everything(cfg.seed, workers=True, verbose=False)
        if cfg.print_config:
            print_config(cfg)
        data, trainer, module = _prepare(cfg)
        _refuse_multirun_launch(trainer)
        _describe(cfg, data, trainer, module)
    _write_provenance(run, cfg)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=cfg.resume, weights_only=True)
    except (Exception, SystemExit):
        if (run / "last.ckpt").exists():
            print_line("stopped", f"continue with the same command and resume={run / 'last.ckpt'}")
        raise
    summary = _summarise(cfg, data, trainer, module)
    _leave_results(run, summary, data, module.student)
    return summary


def _prepare(cfg: DictConfig) -> tuple[ImageDataModule, Trainer, DistillationModule]:
    data: ImageDataModule = instantiate(cfg.data)
    data.prepare_data()
    data.setup()
    print_line("data", data.describe())
    loss: DistillationLoss = instantiate(cfg.loss)
    student = create_model(cfg.model.student.name, data.num_classes)
    if cfg.model.student.weights is not None:
        load_weights(student, cfg.model.student.weights, name=cfg.model.student.name)
    teacher = _build_teacher(cfg, data) if loss.needs_teacher else None
    # Everything above may use random numbers; what follows starts from the seed whether or not there is a teacher.
    seed_everything(cfg.seed, workers=True, verbose=False)
    student = student.to(
        memory_format=torch.channels_last if cfg.model.student.channels_last else torch.preserve_format
    )
    module = DistillationModule(
        student,
        loss,
        instantiate(cfg.recipe.optimizer),
        instantiate(cfg.recipe.scheduler),
        teacher=teacher,
        num_classes=data.num_classes,
        scheduler_interval=cfg.recipe.scheduler_interval,
        info={"student": cfg.model.student.name, "dataset": data.name},
    )
    if cfg.model.compile:
        # In place, so that checkpoint keys stay those of the plain model.
        module.student.compile()
        if teacher is not None:
            teacher.model.compile()
    trainer: Trainer = instantiate(
        cfg.trainer,
        logger=[instantiate(logger) for logger in cfg.logger.values() if logger],
        callbacks=[instantiate(callback) for callback in cfg.callbacks.values() if callback],
    )
    return data, trainer, module


def _build_teacher(cfg: DictConfig, data: LightningDataModule) -> FrozenTeacher:
    settings = cfg.model.teacher
    if settings is None:
        raise ValueError(
            f"the loss needs a teacher and model={cfg.model.label} has none; choose a pair "
            "(model=wrn40_2_to_wrn16_2, or model=pair with model.teacher.name and model.student.name), or loss=ce."
        )
    if settings.weights == "pretrained":
        network = create_model(settings.name, data.num_classes, pretrained=True)
        origin = "pretrained"
    else:
        network = create_model(settings.name, data.num_classes)
        store = TeacherStore(Path(cfg.paths.teachers))
        path = resolve_teacher_weights(
            settings.weights, name=settings.name, dataset=data.name, store=store, url=settings.published_url
        )
        path = path or _fit_teacher(cfg, settings.name, data, store)
        weights = load_weights(network, path, name=settings.name)
        OmegaConf.update(cfg, "model.teacher.weights", str(path))  # what was found is what the run's config says
        origin = f"{path}{_known(weights.metadata)}"
    teacher = FrozenTeacher(network, dtype=settings.dtype, channels_last=settings.channels_last, fuse=settings.fuse)
    precision = settings.dtype or "the trainer's precision"
    print_line("teacher", f"{settings.name}, {_size(network, data)}, {precision}, weights {origin}")
    return teacher


def _known(metadata: dict[str, str]) -> str:
    """What a weights file says about itself, for the console."""
    top1 = f"top-1 {float(metadata['top1']):.2f} %" if "top1" in metadata else ""
    facts = ", ".join(filter(None, (top1, metadata.get("source"))))
    return f" ({facts})" if facts else ""


def _fit_teacher(cfg: DictConfig, name: str, data: ImageDataModule, store: TeacherStore) -> Path:
    """Trains the teacher with cross-entropy and the run's own recipe, in ``<run>/teacher``, and stores it."""
    print_line("teacher", f"{name} is not in {store.path(data.name, name)}: training it first, with cross-entropy")
    own = deepcopy(cfg)
    with_student = {"label": name, "teacher": None, "student": {**cfg.model.student, "name": name, "weights": None}}
    own.model = OmegaConf.merge(cfg.model, {"tuned": None}, with_student)
    own.loss = {"_target_": "rld_lightning.losses.CELoss"}
    own.resume = None
    own.print_config = False
    own.paths.run = str(Path(cfg.paths.run) / "teacher")
    summary = fit(own)
    path = store.path(data.name, name)
    if rank_zero_only.rank == 0:
        state = Path(summary.run) / "student.safetensors"
        network = create_model(name, data.num_classes)
        load_weights(network, state, name=name)
        facts = {"num_classes": data.num_classes, "top1": summary.top1, "epochs": summary.epochs, "seed": summary.seed}
        store.save(network, data.name, name, facts)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # the other ranks read what rank 0 has stored
    return path


def _describe(cfg: DictConfig, data: ImageDataModule, trainer: Trainer, module: DistillationModule) -> None:
    """Prints one line for each part of the run that has not had its own yet."""
    print_line("student", f"{cfg.model.student.name}, {_size(module.student, data)}")
    print_line("loss", f"{module.loss}")
    optimizer = cfg.recipe.optimizer
    devices = trainer.world_size
    print_line(
        "training",
        f"{optimizer._target_.rsplit('.', 1)[-1]}, learning rate {optimizer.lr:g}, batch {cfg.data.batch_size} = "
        f"{devices} x {cfg.data.batch_size // devices} on {trainer.strategy.root_device.type}, "
        f"precision {trainer.precision}, {trainer.max_epochs} epochs",
    )
    print_line("folder", str(cfg.paths.run))


def _size(model: nn.Module, data: ImageDataModule) -> str:
    parameters, macs = count_parameters(model), count_macs(model, data.image_shape)
    return f"{parameters / 1e6:.2f} M parameters, {macs / 1e6:.1f} M MACs"


def _summarise(cfg: DictConfig, data: ImageDataModule, trainer: Trainer, module: DistillationModule) -> Summary:
    metrics = dict(trainer.callback_metrics)
    if "val/top1" not in metrics:  # trainer.max_steps ended training within the first epoch
        trainer.validate(module, datamodule=data, verbose=False)
        metrics |= trainer.callback_metrics
        metrics["val/top1_best"] = metrics["val/top1"]
    metrics = {name: float(value) for name, value in metrics.items()}
    return Summary(
        model=cfg.model.student.name,
        loss=type(module.loss).__name__.removesuffix("Loss"),
        dataset=data.name,
        validated_on=f"{data.val_fraction:.0%} of the training split" if data.val_fraction else "test split",
        epochs=trainer.current_epoch,
        seed=cfg.seed,
        top1=metrics["val/top1"],
        top1_best=metrics["val/top1_best"],
        top5=metrics.get("val/top5"),
        ce=metrics["val/ce"],
        teacher=cfg.model.teacher.name if module.teacher is not None else None,
        teacher_top1=metrics.get("val/teacher_top1"),
        agreement=metrics.get("val/agreement"),
        parameters=count_parameters(module.student),
        macs=count_macs(module.student, data.image_shape),
        images_per_s=metrics.get("train/images_per_s"),
        run=str(cfg.paths.run),
    )


@rank_zero_only
def _leave_results(run: Path, summary: Summary, data: ImageDataModule, student: nn.Module) -> None:
    (run / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
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
        "source": "fit",
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
        f"{summary.model}{teacher}, {summary.loss}, {summary.dataset} (validated on the {summary.validated_on})",
        ("", "student"),
        [row for row in rows if row[1]],
    )
    for file, what in (
        ("student.safetensors", "the student's weights"),
        ("summary.json", "these numbers"),
        ("metrics.csv", "every logged value"),
        ("curves.png", "learning curves"),
    ):
        console.print(f"  {run / file}  [dim]{what}", soft_wrap=True)


@rank_zero_only
def _write_provenance(run: Path, cfg: DictConfig) -> None:
    """Leaves the resolved configuration and the versions that the run used."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
    (run / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


def _refuse_used_folder(run: Path) -> None:
    if rank_zero_only.rank == 0 and (run / "summary.json").exists():
        raise ValueError(f"{run} holds a finished run; choose another paths.run, nothing is overwritten.")


def _refuse_multirun_launch(trainer: Trainer) -> None:
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if multirun and trainer.world_size > 1:
        raise ValueError(
            f"--multirun with {trainer.world_size} processes a trial would train each process with other values; use "
            "trainer.devices=1, or start one command a trial."
        )
