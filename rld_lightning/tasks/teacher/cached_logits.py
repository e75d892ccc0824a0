"""Decides whether a run uses a table of the teacher's logits instead of computing them, and where the table is."""

import math
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.models.complexity import count_macs
from rld_lightning.models.normalisation import Renormalise
from rld_lightning.models.registry import canonical_name
from rld_lightning.models.teacher.ensemble import Ensemble
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.teacher.logits_table import LogitsTable, table_bytes, table_key
from rld_lightning.models.teacher.teacher_store import TeacherStore
from rld_lightning.models.teacher.torchscript_and_onnx import FOREIGN
from rld_lightning.module import DistillationModule
from rld_lightning.tasks.run.fold_and_compile import images_to_train
from rld_lightning.tasks.run.plan import Plan, Teacher
from rld_lightning.tasks.teacher.fill_cache import FillAhead

_SHARE = 0.05  # minimum share of a step that the teacher takes: lookups are not free
_SAMPLE = 2000  # rows that are checked
_VALIDATION = "validation-"  # name prefix of tables of validation images, which are small


def cache_logits(module: DistillationModule, plan: Plan, data: ImageDataModule, trainer: Trainer) -> None:
    """Makes the teacher cache its logits, in a file beside the teachers, if requested; prints one line.

    If all are to be computed ahead, adds a callback to the trainer that does so when training starts.

    Raises:
        ValueError: the cache's data type is unknown, or there is no room for a requested cache.
        OSError: the file cannot be created.
    """
    if module.teacher is None or plan.teacher is None or not plan.teacher.cache:
        return
    reason = _why_logits_do_not_suffice(module.loss) or why_not_cacheable(module.teacher, trainer, data)
    why = "the teacher's"
    if not reason and plan.teacher.cache == "auto":
        share = _share_of_step(module, data)
        reason = "" if share >= _SHARE else "the teacher takes little of a step; model.teacher.cache=true turns it on"
        why = f"the teacher takes {share:.0%} of a step: its"
    ahead = plan.teacher.cache == "fill"
    path = None if reason else table_path(module.teacher, plan.teacher, data, trainer, plan.store)
    if path is not None and plan.teacher.cache == "auto" and trainer.strategy.root_device.type == "cuda":
        # Missing rows need a synchronisation and separate launches: slower than a teacher within the step's graph.
        ahead = images_to_train(data, trainer) >= (data.train_views or math.inf)
        if not ahead and not _is_known(path, plan.teacher, data):
            reason = (
                "on a GPU it pays only if all logits are known or the run is long; model.teacher.cache=fill computes "
                "them first"
            )
    if path is None or reason:
        print_line("cache", f"off: {reason}")
        return
    table = open_table(path, plan.teacher, data, why)
    if table is None:
        return
    table.rows_to_read = partial(data.views_of, slice(0, data.train_size))
    module.teacher.use_table(table)
    if ahead:
        vars(trainer)["callbacks"].append(FillAhead())


def cache_validation_logits(teacher: FrozenTeacher, plan: Plan, data: ImageDataModule) -> None:
    """Makes a teacher cache its logits of the validation images, in float32, if it caches any.

    So runs and trials compute them once, for the teacher's accuracy and for its agreement with the student.
    """
    facts, planned = data.val_facts(), plan.teacher
    if facts is None or planned is None or not planned.cache or teacher.shard or torch.float64 in _dtypes(teacher):
        return
    facts |= {**_teacher_facts(teacher, planned, data), "validated in": str(teacher.dtype)}
    key = table_key(teacher.model.state_dict(), facts)
    path = _folder(plan.store, data, planned) / f"{_VALIDATION}{canonical_name(planned.name)}-{key}.logits"
    size = table_bytes(data.val_size, data.num_classes, "float32")
    with suppress(OSError):  # if the file cannot be written, logits are computed each time
        if size < _free(path) / 2:
            teacher.validation_table = LogitsTable(path, data.val_size, data.num_classes, "float32")


def open_table(path: Path, planned: Teacher, data: ImageDataModule, why: str = "the teacher's") -> LogitsTable | None:
    """Opens or creates a teacher's table, and prints one line about it.

    Args:
        why: the beginning of the line.

    Returns:
        the table; None if the disk is full or not writable, and ``planned.cache`` is ``"auto"``.

    Raises:
        ValueError: the disk is full, otherwise.
        OSError: it is not writable, otherwise.
    """
    rows = data.train_views
    assert rows is not None  # otherwise `why_not_cacheable` gives a reason
    folder = path.parent
    size, taken = table_bytes(rows, data.num_classes, planned.cache_dtype), _bytes_on_disk(path)
    free = _free(path)
    if size - taken > free * (0.5 if planned.cache == "auto" else 0.9):
        full = f"it may grow by {_gigabytes(size - taken)}, and {_gigabytes(free)} are free in {folder}"
        if planned.cache != "auto":
            raise ValueError(f"the teacher's logits have no room: {full}; make room, or set model.teacher.cache=false.")
        print_line("cache", f"off: {full}; free some space to use it")
        return None
    try:
        table = LogitsTable(path, rows, data.num_classes, planned.cache_dtype)
    except OSError as error:
        if planned.cache != "auto":
            raise
        print_line("cache", f"off: {path} cannot be written ({error.strerror or error})")
        return None
    known = 100 * table.known(_sample_views(data)).float().mean()
    others = [other for other in folder.glob("*.logits") if other != path and not other.name.startswith(_VALIDATION)]
    beside = f"; {len(others)} other(s) there take {_gigabytes(sum(map(_bytes_on_disk, others)))}" if others else ""
    print_line(
        "cache",
        f"{why} logits of {rows:,} views are looked up, in {planned.cache_dtype}, {_gigabytes(size)} when full, "
        f"about {known:.0f} % of this run's known: {path}{beside}",
    )
    return table


def table_path(
    teacher: FrozenTeacher, planned: Teacher, data: ImageDataModule, trainer: Trainer, store: TeacherStore
) -> Path:
    """Returns the path of a teacher's table, which need not exist; reads all of its weights for the key."""
    key = _key(teacher, planned, data, trainer)
    return _folder(store, data, planned) / f"{canonical_name(planned.name)}-{key}.logits"


def _is_known(path: Path, planned: Teacher, data: ImageDataModule) -> bool:
    """Whether a table exists and contains all of a sample of the run's views."""
    if not path.is_file() or data.train_views is None:
        return False
    try:
        table = LogitsTable(path, data.train_views, data.num_classes, planned.cache_dtype)
    except (OSError, ValueError):  # reported when the table is used
        return False
    return bool(table.known(_sample_views(data)).all())


def _sample_views(data: ImageDataModule) -> Tensor:
    """Returns a sample of the run's views, spread over its images and their crops."""
    asked = data.views_of(slice(0, data.train_size))
    return asked[torch.linspace(0, len(asked) - 1, min(len(asked), _SAMPLE), dtype=torch.float64).long()]


def _why_logits_do_not_suffice(loss: DistillationLoss) -> str:
    """Returns why a loss needs more than logits of cacheable views; empty if it does not."""
    if loss.teacher_taps:
        return f"{type(loss).__name__} uses features of the teacher"
    if loss.needs_strong_view:
        return f"{type(loss).__name__} uses strongly augmented images, which have unlimited views"
    return ""


def why_not_cacheable(teacher: FrozenTeacher, trainer: Trainer, data: ImageDataModule) -> str:
    """Returns why logits cannot be cached; empty if they can."""
    if data.train_views is None:
        return "these data have unlimited augmented views"
    if teacher.shard:
        return "the teacher is sharded (model.teacher.shard)"
    if torch.float64 in _dtypes(teacher) or "64" in str(trainer.precision):
        return "logits in float64 would be rounded"
    return ""


def _share_of_step(module: DistillationModule, data: ImageDataModule) -> float:
    """Returns the teacher's share of a step's work, in (0, 1)."""
    assert module.teacher is not None
    teacher = count_macs(module.teacher.model, module.teacher.input_shape(data.image_shape))
    student = count_macs(module.student, data.image_shape)
    return teacher / (teacher + 3 * student)  # a backward pass takes as long as two forward passes


def _dtypes(teacher: FrozenTeacher) -> tuple[torch.dtype | None, torch.dtype | None]:
    return teacher.dtype, next((parameter.dtype for parameter in teacher.parameters()), None)


def _folder(store: TeacherStore, data: ImageDataModule, planned: Teacher) -> Path:
    return store.path(data.name, planned.name).parent / "logits"


def _free(path: Path) -> int:
    """Returns the free bytes on the disk of a path that need not exist yet."""
    return shutil.disk_usage(next(place for place in path.absolute().parents if place.exists())).free


def _bytes_on_disk(path: Path) -> int:
    """Returns a file's size on disk, without holes."""
    return 512 * path.stat().st_blocks if path.is_file() else 0


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _key(teacher: FrozenTeacher, planned: Teacher, data: ImageDataModule, trainer: Trainer) -> str:
    facts = {
        **data.views_facts(),
        **_teacher_facts(teacher, planned, data),
        "precision": str(teacher.dtype or trainer.precision),
        "stored": planned.cache_dtype,
    }
    return table_key(teacher.model.state_dict(), facts)


def _teacher_facts(teacher: FrozenTeacher, planned: Teacher, data: ImageDataModule) -> dict[str, Any]:
    members = teacher.model.renormalises if isinstance(teacher.model, Ensemble) else ()
    return {
        "classes": data.num_classes,
        "network": canonical_name(planned.name),
        "look": _renormalise_fact(teacher.renormalise),
        "exact_logits": teacher.exact_logits,
        "of several": [
            planned.mean_of,
            str(planned.normalisation),
            str(planned.class_map),
            *map(_renormalise_fact, members),
        ],
        "sha256": planned.sha256 if set(FOREIGN) & set(planned.name.split("+")) else None,  # state_dict lacks theirs
    }


def _renormalise_fact(renormalise: nn.Module | None) -> list[Any] | None:
    if not isinstance(renormalise, Renormalise):
        return None
    return [renormalise.scale.flatten().tolist(), renormalise.shift.flatten().tolist(), renormalise.size]
