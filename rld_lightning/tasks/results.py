"""What a run leaves behind and prints at its end."""

from pathlib import Path

from torch import nn

from rld_lightning.console import print_files, print_table
from rld_lightning.data.base import ImageDataModule
from rld_lightning.distributed import rank_zero_only
from rld_lightning.models.save import save_weights
from rld_lightning.reporting.curves import plot_curves
from rld_lightning.runs.files import CLASSES, CURVES, METRICS, STUDENT, SUMMARY
from rld_lightning.runs.summary import Summary
from rld_lightning.tracking import wandb_facts


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
    save_weights(student, run / STUDENT, facts)
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
        STUDENT: "the student's weights",
        SUMMARY: "these numbers",
        METRICS: "every logged value",
        CLASSES: "accuracy of each class",
        CURVES: "learning curves",
    }
    print_files(run, {name: what for name, what in files.items() if (run / name).exists()})
