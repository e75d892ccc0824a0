"""Whether a run looks the teacher's logits up instead of computing them, and where they lie."""

import shutil
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.models.complexity import count_macs
from rld_lightning.models.foreign import FOREIGN
from rld_lightning.models.logits_table import LogitsTable, table_bytes, table_key
from rld_lightning.models.registry import canonical_name
from rld_lightning.models.teacher import FrozenTeacher
from rld_lightning.module import DistillationModule
from rld_lightning.tasks.plan import Plan, Teacher

_SHARE = 0.05  # of a step that the teacher has to take: looking up is not for nothing
_SAMPLE = 2000  # rows


def remember_logits(module: DistillationModule, plan: Plan, data: ImageDataModule, trainer: Trainer) -> None:
    """Has the teacher remember its logits, in a file beside the teachers, where that is wanted; prints one line.

    Args:
        module: with the teacher and the loss, which has been connected.
        plan: what the run is to do.
        data: the data, set up.
        trainer: that is to train.

    Raises:
        ValueError: an unknown type to keep logits in.
        OSError: the file cannot be made.
    """
    if module.teacher is None or plan.teacher is None or not plan.teacher.cache:
        return
    rows = data.train_views
    reason = _impossible(module.teacher, module.loss, trainer, rows)
    if reason or rows is None:
        print_line("cache", f"off: {reason}")
        return
    folder = plan.store.path(data.name, plan.teacher.name).parent / "logits"
    size = table_bytes(rows, data.num_classes, plan.teacher.cache_dtype)
    if plan.teacher.cache == "auto" and (reason := _no_use(module, data, size, folder)):
        print_line("cache", f"off: {reason}; model.teacher.cache=true switches it on")
        return
    table = LogitsTable(
        folder / f"{canonical_name(plan.teacher.name)}-{_key(module.teacher, plan.teacher, data, trainer)}.logits",
        rows,
        data.num_classes,
        plan.teacher.cache_dtype,
    )
    known = 100 * table.read(torch.linspace(0, rows - 1, min(rows, _SAMPLE)).long())[1].float().mean()
    print_line(
        "cache",
        f"teacher's logits of {rows:,} views in {plan.teacher.cache_dtype}, {size / 1e6:,.0f} MB when full, about "
        f"{known:.0f} % known: {table.path}",
    )
    module.teacher.remember(table)


def _impossible(teacher: FrozenTeacher, loss: DistillationLoss, trainer: Trainer, rows: int | None) -> str:
    """Why logits cannot be looked up; nothing where they can."""
    if loss.teacher_taps:
        return f"{type(loss).__name__} looks inside the teacher"
    if loss.needs_strong_view:
        return f"{type(loss).__name__} looks at strongly augmented images, of which there is no end"
    if rows is None:
        return "there is no end of augmented images of these data"
    if teacher.shard:
        return "the teacher is shared out"
    if torch.float64 in (teacher.dtype, next(teacher.parameters()).dtype) or "64" in str(trainer.precision):
        return "logits in float64 would be rounded"
    return ""


def _no_use(module: DistillationModule, data: ImageDataModule, size: int, folder: Path) -> str:
    """Why looking up would not pay; nothing where it does."""
    assert module.teacher is not None
    teacher, student = (count_macs(net, data.image_shape) for net in (module.teacher.model, module.student))
    if teacher < _SHARE * (teacher + 3 * student):  # backward takes as long as two forwards
        return "the teacher takes little of a step"
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size > free / 2:
        return f"it may grow to {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {folder}"
    return ""


def _key(teacher: FrozenTeacher, planned: Teacher, data: ImageDataModule, trainer: Trainer) -> str:
    look = teacher.relook
    facts = {
        **data.views_facts(),
        "classes": data.num_classes,
        "network": canonical_name(planned.name),
        "look": None if look is None else [look.scale.flatten().tolist(), look.shift.flatten().tolist(), look.size],
        "precision": str(teacher.dtype or trainer.precision),
        "exact_logits": teacher.exact_logits,
        "stored": planned.cache_dtype,
    }
    if planned.name in FOREIGN:  # whose weights are not seen
        facts["sha256"] = planned.sha256
    return table_key(teacher.model.state_dict(), facts)
