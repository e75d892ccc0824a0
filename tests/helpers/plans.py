"""Plans of runs."""

from pathlib import Path
from typing import Any

from rld_lightning.models.teacher.teacher_store import TeacherStore
from rld_lightning.tasks.run.plan import Plan, Student, Teacher


def make_plan(run: Path, **values: Any) -> Plan:
    """A plan for distilling a student in folder ``run``; ``values`` replace defaults."""
    options = {"dtype": None, "channels_last": True, "fuse": False, "shard": False}
    usual = {
        "resume": None,
        "processes": 1,
        "seed": 0,
        "label": "resnet14_to_resnet8",
        "student": Student("resnet8", None, channels_last=True),
        "teacher": Teacher("resnet14", "auto", "", None, options),
        "store": TeacherStore(run / "teachers"),
        "compile": False,
        "capture": False,
        "loss": "KD",
        "batch_size": 64,
        "other_sizes": True,
        "optimizer": "SGD",
        "recipe_rate": 0.1,
        "scale_lr_from": None,
        "scheduler_interval": "step",
        "scheduler_monitor": None,
    }
    return Plan(run=run, **usual | values)
