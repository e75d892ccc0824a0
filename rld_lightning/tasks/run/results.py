"""Computes, writes and prints the results of a run."""

import resource
import sys
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from statistics import median

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from rld_lightning.callbacks import ExactResume
from rld_lightning.console import duration, print_files, print_line, print_table
from rld_lightning.data.base import ImageDataModule
from rld_lightning.distributed import rank_zero_only
from rld_lightning.errors import UserError
from rld_lightning.models.complexity import count_macs, count_parameters
from rld_lightning.models.weights.save import save_weights
from rld_lightning.module import DistillationModule
from rld_lightning.runs.files import BEST, CLASSES, CURVES, METRICS, STUDENT, SUMMARY
from rld_lightning.runs.metrics_csv import read_rows
from rld_lightning.runs.summary import Summary
from rld_lightning.tasks.run.plan import Plan
from rld_lightning.tracking import wandb_facts
from rld_lightning.trainer_callbacks import callbacks_of


def summarise(plan: Plan, trainer: Trainer, module: DistillationModule, data: ImageDataModule) -> Summary:
    """Returns the results of a run.

    Raises:
        UserError: the weights are not finite, or no image was evaluated: such a student is neither exported nor stored
            as a teacher.
    """
    if not all(value.isfinite().all() for value in module.student.state_dict().values()):
        raise UserError(
            f"training diverged in epoch {trainer.current_epoch}: the weights are not finite. Try a smaller "
            f"recipe.optimizer.lr or trainer.gradient_clip_val; what was logged is in {plan.run / METRICS}."
        )
    logged = dict(trainer.callback_metrics)
    # Training ended between validations, or a callback has averaged the weights.
    if late := not module.is_validated():
        trainer.validate(module, datamodule=data, verbose=False)
        logged |= trainer.callback_metrics
    metrics = {name: float(value) for name, value in logged.items()}
    images = module.means["val"].samples
    if not images:
        raise UserError(
            f"not one image of the {data.val_split} split of {data.name} was evaluated, so that there is no result: "
            "raise trainer.limit_val_batches, or see the run's bad_images.txt."
        )
    if late:
        _keep_best(plan.run, trainer, module, metrics["val/top1"])
    all_batches = sum(trainer.num_val_batches) >= len(data.eval_sampler(data.val_size))
    return Summary(
        model=module.hparams["student"],
        loss=plan.loss,
        dataset=data.name,
        split=data.val_split,
        images=images,
        val_fraction=data.val_fraction,
        data_seed=data.seed,
        epochs=trainer.current_epoch,
        seed=plan.seed,
        top1=metrics["val/top1"],
        top1_best=max(module.best_top1, metrics["val/top1"]),
        top5=metrics.get("val/top5"),
        ce=metrics["val/ce"],
        teacher=plan.teacher.name if plan.teacher is not None else None,
        teacher_top1=metrics.get("val/teacher_top1"),
        agreement=metrics.get("val/agreement"),
        parameters=count_parameters(module.student),
        macs=count_macs(module.student, data.image_shape),
        images_per_s=_speed(plan.run, metrics),
        run=str(plan.run),
        split_images=images if all_batches else data.val_size,  # without unreadable images
        steps=trainer.global_step,
        scheduled_steps=_scheduled_steps(trainer, data),
        seconds=next((callback.seconds for callback in callbacks_of(trainer, ExactResume)), None),
        peak_memory_gb=_peak_memory(trainer.strategy.root_device),
        fast_dev_run=bool(trainer.fast_dev_run),  # type: ignore[attr-defined]  # not declared by Lightning
        teacher_sha256=plan.teacher.sha256 if plan.teacher is not None else None,
    )


def _keep_best(run: Path, trainer: Trainer, module: DistillationModule, top1: float) -> None:
    """Handles a validation after training like the others: logs the best accuracy, and saves its weights."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if top1 > module.best_top1:
        module.best_top1 = top1
        paths = [Path(callback.format_checkpoint_name({})) for callback in callbacks_of(trainer, ModelCheckpoint)]
        if run / BEST in paths:  # unless checkpoint_best has been switched off
            trainer.save_checkpoint(run / BEST, weights_only=True)
    for logger in trainer.loggers:
        logger.log_metrics({"val/top1_best": module.best_top1, "epoch": trainer.current_epoch}, trainer.global_step)
        logger.save()


def _peak_memory(device: torch.device) -> float:
    """Returns this process's peak memory in GB: of its GPU, or else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9  # grows only: the allocator keeps what is freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _speed(run: Path, logged: Mapping[str, float]) -> float | None:
    """Returns the training speed in images/s: the median over the epochs, as other programs may slow some down."""
    name = "train/images_per_s"
    epochs = [row[name] for row in read_rows(run) if name in row]
    return median(epochs) if epochs else logged.get(name)


def _scheduled_steps(trainer: Trainer, data: ImageDataModule) -> int | None:
    """Returns the number of optimizer steps of all epochs on all batches; None if the epochs are unlimited."""
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return None
    return trainer.max_epochs * ceil(len(data.train_sampler()) / trainer.accumulate_grad_batches)


@rank_zero_only
def write_results(run: Path, summary: Summary, data: ImageDataModule, student: nn.Module) -> None:
    """Writes summary, student and curves, and prints the summary as a table."""
    facts = {
        "name": summary.model,
        "dataset": summary.dataset,
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "image_shape": list(data.image_shape),
        "resize": data.eval_resize,
        "interpolation": "bilinear",
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
    save_weights(student, run / STUDENT, facts)
    teacher = f" from {summary.teacher}" if summary.teacher else ""
    try:
        if (run / METRICS).exists():
            title = f"{summary.model}{teacher}, {summary.loss}, {summary.dataset}, seed {summary.seed}"
            _draw_curves(run, title, summary)
    finally:
        summary.write(run)  # last: the summary marks a run as finished
    # The purpose of debug=overfit.
    by_heart = next(iter(read_rows(run)[-1:]), {}).get("train/top1") if not summary.trained_whole else None
    part = summary.scheduled_steps and not summary.trained_whole
    rows = [
        ("steps of the optimizer", f"{summary.steps:,} of {summary.scheduled_steps:,}" if part else None),
        ("top-1, training images", f"{by_heart:.2f} %" if by_heart is not None else None),
        ("top-1, last epoch", f"{summary.top1:.2f} %"),
        ("top-1, best epoch", f"{summary.top1_best:.2f} %"),
        ("top-5, last epoch", f"{summary.top5:.2f} %" if summary.top5 is not None else None),
        ("teacher top-1", f"{summary.teacher_top1:.2f} %" if summary.teacher_top1 is not None else None),
        ("agreement with teacher", f"{summary.agreement:.2f} %" if summary.agreement is not None else None),
        ("training speed", f"{summary.images_per_s:,.0f} images/s" if summary.images_per_s else None),
        ("duration", duration(summary.seconds) if summary.seconds else None),
        ("peak memory", f"{summary.peak_memory_gb:.2f} GB" if summary.peak_memory_gb else None),
    ]
    print_table(
        f"{summary.model}{teacher}, {summary.loss}, {summary.dataset}; validated on {summary.validation_images}",
        ("", "student"),
        [row for row in rows if row[1]],
    )
    if summary.fast_dev_run:
        print_line("caution", "trainer.fast_dev_run only tests that everything works; these numbers are not a result")
    files = {
        STUDENT: "the student's weights",
        BEST: f"those of the best epoch ({summary.top1_best:.2f} %)" if summary.top1_best > summary.top1 else "",
        SUMMARY: "these numbers",
        METRICS: "what was logged, one row an epoch",
        CLASSES: "accuracy of each class",
        CURVES: "learning curves",
    }
    print_files(run, {name: what for name, what in files.items() if what and (run / name).exists()})


def _draw_curves(run: Path, title: str, summary: Summary) -> None:
    try:
        from rld_lightning.reporting.curves import plot_curves  # pandas and matplotlib are an extra
    except ImportError as error:
        print_line("curves", f'not drawn ({error}): pip install "rld-lightning[report]"')
        return
    plot_curves(run, title, summary)
