"""Trains a student, with or without a teacher, and leaves a run folder that explains itself."""

import gc
import os
from copy import deepcopy
from pathlib import Path

import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from omegaconf import DictConfig

from rld_lightning.callbacks import SameConfiguration
from rld_lightning.console import print_config, print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.data.sampler import share_of_batch
from rld_lightning.distributed import rank_zero_only
from rld_lightning.errors import UserError, user_errors
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.models.complexity import count_macs, count_parameters
from rld_lightning.models.factory import create_model
from rld_lightning.models.store import TeacherStore
from rld_lightning.models.teacher import FrozenTeacher
from rld_lightning.models.verify import load_weights
from rld_lightning.module import DistillationModule
from rld_lightning.runs.files import SUMMARY
from rld_lightning.runs.folder import locked
from rld_lightning.runs.metrics import join_metrics, keep_metrics
from rld_lightning.runs.naming import class_name, loss_name
from rld_lightning.runs.provenance import write_provenance
from rld_lightning.runs.summary import Summary, read_summary
from rld_lightning.tasks.check import check_network
from rld_lightning.tasks.launch import processes_to_start, run_in_processes, started_here
from rld_lightning.tasks.preflight import check_start, check_trainer
from rld_lightning.tasks.results import leave_results
from rld_lightning.tasks.teacher import build_teacher, connect, describe_size, find_teacher, teacher_config
from rld_lightning.tracking import wandb_run


def fit(cfg: DictConfig) -> Summary:
    """Runs the whole job that ``conf/fit.yaml`` describes, in as many processes as ``cfg.trainer`` wants.

    Args:
        cfg: the composed configuration.

    Returns:
        the summary; on ranks other than 0 as well.

    Raises:
        UserError: something in the configuration or the files it names is wrong, raised before training starts; or
            training diverged, or a process of several was lost.
    """
    run = Path(cfg.paths.run)
    with user_errors():
        processes = processes_to_start(cfg.trainer)
        if processes > 1:
            share_of_batch(cfg.data.batch_size, processes)
            check_start(cfg, run)  # one sentence is better early than from all ranks
    with locked(run):
        if processes > 1:
            run_in_processes(processes, "rld_lightning.tasks.fit:fit", cfg)
            return read_summary(run)
        # Where processes were started here, the one that has started them says how to continue.
        summary, _ = _fit(cfg, resume_hint=not started_here())
    return summary


def _fit(cfg: DictConfig, *, resume_hint: bool) -> tuple[Summary, DistillationModule]:
    run = Path(cfg.paths.run)
    gc.collect()  # an earlier run of this process, of a sweep say, leaves its data in reference cycles
    with user_errors():
        check_start(cfg, run)
        same_configuration = SameConfiguration(cfg)
        seed_everything(cfg.seed, workers=True, verbose=False)
        if cfg.print_config:
            print_config(cfg)
        loss: DistillationLoss = instantiate(cfg.loss)
        if loss.needs_teacher and cfg.model.teacher is None:
            raise ValueError(
                f"the loss needs a teacher and model={cfg.model.label} has none; choose a pair "
                "(model=wrn40_2_to_wrn16_2, or model=pair with model.teacher.name and model.student.name), or loss=ce."
            )
        data: ImageDataModule = instantiate(cfg.data)
        data.prepare_data()
        data.setup()
        print_line("data", data.describe())
        data.strong_view = loss.needs_strong_view
        for role in ("student", "teacher") if loss.needs_teacher else ("student",):
            check_network(cfg.model[role].name, data, cfg.data)
        teacher_is_there = not loss.needs_teacher or find_teacher(cfg, data)
    if not teacher_is_there:
        with user_errors():
            _try_to_connect(cfg, data)
        _fit_teacher(cfg, data)
    with user_errors():
        teacher = build_teacher(cfg, data) if loss.needs_teacher else None
        trainer, module = _build(cfg, data, loss, teacher)
        trainer.callbacks.append(same_configuration)
        _describe(cfg, data, trainer, module)
    write_provenance(run, cfg)
    keep_metrics(run, cfg.resume)
    with wandb_run(trainer, cfg):
        try:
            _train(cfg, data, trainer, module, resume_hint=resume_hint)
            _refuse_diverged(trainer, module, run)
            summary = _summarise(cfg, data, trainer, module)
        finally:  # only now: the summary may have to validate, which logs
            join_metrics(run, cfg.resume)
        leave_results(run, summary, data, module.student)
    return summary, module


def _build(
    cfg: DictConfig, data: ImageDataModule, loss: DistillationLoss, teacher: FrozenTeacher | None
) -> tuple[Trainer, DistillationModule]:
    # Whatever came before may have used random numbers; the student starts from the seed with or without a teacher.
    seed_everything(cfg.seed, workers=True, verbose=False)
    settings = cfg.model.student
    pretrained = {"pretrained": True} if settings.weights == "pretrained" else {}
    student = create_model(settings.name, data.num_classes, **pretrained)
    if settings.weights not in (None, "pretrained"):
        load_weights(student, settings.weights, name=settings.name)
    name = settings.name
    if teacher is not None:
        plain, student = student, connect(loss, student, teacher.model, data.image_shape, data.train_label)
        if student is not plain:
            name = f"{name}@{cfg.model.teacher.name}"
    layout = torch.channels_last if settings.channels_last else torch.preserve_format
    recipe = scale_learning_rate(cfg).recipe
    module = DistillationModule(
        student.to(memory_format=layout),
        loss.to(memory_format=layout),
        instantiate(recipe.optimizer),
        instantiate(recipe.scheduler),
        teacher=teacher,
        num_classes=data.num_classes,
        scheduler_interval=cfg.recipe.scheduler_interval,
        info={"student": name, "dataset": data.name, **data.split_facts},
    )
    if cfg.model.compile:
        # In place, so that checkpoint keys stay those of the plain model. Not where hooks would send it back to eager:
        # those of taps, and those that gather the weights of a teacher that is shared out.
        if not loss.student_taps:
            module.student.compile()
        if teacher is not None and not teacher.shard and not loss.teacher_taps:
            teacher.model.compile()
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values() if callback]
    trainer: Trainer = instantiate(
        cfg.trainer,
        logger=[instantiate(logger) for logger in cfg.logger.values() if logger],
        callbacks=callbacks,
        # Lightning would put its own in the place of what callbacks.<name>=null has switched off.
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )
    check_trainer(trainer, cfg)
    return trainer, module


def scale_learning_rate(cfg: DictConfig) -> DictConfig:
    """Linear scaling (Goyal et al., arXiv 1706.02677): a recipe's rate times batch size over ``recipe.scale_lr_from``.

    Returns:
        a copy with the scaled ``recipe.optimizer.lr``, which schedulers that refer to it follow; ``cfg`` itself when
        nothing is to be scaled.

    Raises:
        ValueError: the batch size to scale from is not positive.
    """
    reference = cfg.recipe.get("scale_lr_from")
    if reference is None:
        return cfg
    if reference < 1:
        raise ValueError(f"recipe.scale_lr_from={reference} must be a batch size, such as 256, or null for no scaling.")
    scaled = deepcopy(cfg)
    scaled.recipe.optimizer.lr = cfg.recipe.optimizer.lr * cfg.data.batch_size / reference
    return scaled


def _train(
    cfg: DictConfig, data: ImageDataModule, trainer: Trainer, module: DistillationModule, *, resume_hint: bool
) -> None:
    try:
        trainer.fit(module, datamodule=data, ckpt_path=cfg.resume, weights_only=True)
    except (Exception, SystemExit):
        last = Path(cfg.paths.run) / "last.ckpt"
        if resume_hint and last.exists():
            print_line("stopped", f"continue with the same command and resume={last}")
        raise


def _try_to_connect(cfg: DictConfig, data: ImageDataModule) -> None:
    """Lets fresh networks show that the loss can work with them, before a teacher is trained for it."""
    teacher, student = (create_model(cfg.model[role].name, data.num_classes) for role in ("teacher", "student"))
    connect(instantiate(cfg.loss), student, teacher, data.image_shape, data.train_label)


def _fit_teacher(cfg: DictConfig, data: ImageDataModule) -> None:
    """Trains the teacher with cross-entropy and the run's own recipe, in ``<run>/teacher``, and stores it.

    One that has not seen all training images is no teacher for other runs, and stays there.
    """
    name = cfg.model.teacher.name
    store = TeacherStore(Path(cfg.paths.teachers))
    path = store.path(data.name, name)
    folder = Path(cfg.paths.run) / "teacher"
    if not (folder / SUMMARY).exists():
        print_line("teacher", f"{name} is not in {path}: training it first, with cross-entropy")
        own = teacher_config(cfg, folder)
        own.resume = str(folder / "last.ckpt") if (folder / "last.ckpt").exists() else None  # of this run, interrupted
        if "WANDB_RUN_ID" in os.environ:  # a sweep agent's, for the student
            own.logger.pop("wandb", None)
        _fit(own, resume_hint=False)
    if data.val_fraction > 0 or data.subset < 1:
        path = folder / "student.safetensors"
    elif rank_zero_only.rank == 0:
        store.add(folder / "student.safetensors", data.name, name)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # the other ranks read what rank 0 has stored
    cfg.model.teacher.weights = str(path)


def _describe(cfg: DictConfig, data: ImageDataModule, trainer: Trainer, module: DistillationModule) -> None:
    """Prints one line for each part of the run that has not had its own yet."""
    print_line("student", f"{module.hparams.student}, {describe_size(module.student, data)}")
    print_line("loss", module.loss.describe())
    optimizer = cfg.recipe.optimizer
    rate = f"{scale_learning_rate(cfg).recipe.optimizer.lr:g}"
    if cfg.recipe.get("scale_lr_from") is not None:
        rate += f" = {optimizer.lr:g} x {cfg.data.batch_size} / {cfg.recipe.scale_lr_from}"
    devices = trainer.world_size
    print_line(
        "training",
        f"{class_name(optimizer._target_)}, learning rate {rate}, batch {cfg.data.batch_size} = "
        f"{devices} x {cfg.data.batch_size // devices} on {trainer.strategy.root_device.type}, "
        f"precision {trainer.precision}, {trainer.max_epochs} epochs",
    )
    print_line("folder", str(cfg.paths.run))


def _summarise(cfg: DictConfig, data: ImageDataModule, trainer: Trainer, module: DistillationModule) -> Summary:
    metrics = dict(trainer.callback_metrics)
    if module.validated_step != trainer.global_step:  # training ended within an epoch, or between validations
        trainer.validate(module, datamodule=data, verbose=False)
        metrics |= trainer.callback_metrics
    metrics = {name: float(value) for name, value in metrics.items()}
    return Summary(
        model=module.hparams.student,
        loss=loss_name(cfg.loss),
        dataset=data.name,
        split=data.val_split,
        images=data.val_size,
        val_fraction=data.val_fraction,
        data_seed=data.seed,
        epochs=trainer.current_epoch,
        seed=cfg.seed,
        top1=metrics["val/top1"],
        top1_best=max(module.best_top1, metrics["val/top1"]),
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


def _refuse_diverged(trainer: Trainer, module: DistillationModule, run: Path) -> None:
    """A student that is no numbers any more is no result: it is neither exported nor stored as a teacher."""
    if not all(value.isfinite().all() for value in module.student.state_dict().values()):
        raise UserError(
            f"training diverged in epoch {trainer.current_epoch}: the weights are not finite. Try a smaller "
            f"recipe.optimizer.lr or trainer.gradient_clip_val; what was logged is in {run / 'metrics.csv'}."
        )
