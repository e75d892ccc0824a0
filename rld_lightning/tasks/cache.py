"""Computes a teacher's logits for all views of the training images ahead of runs and sweeps."""

from dataclasses import replace
from pathlib import Path

from lightning.pytorch import seed_everything
from omegaconf import DictConfig

from rld_lightning.errors import user_errors
from rld_lightning.hydra.checks.targets import check_parts
from rld_lightning.losses.kd import KDLoss
from rld_lightning.models.imported import trust
from rld_lightning.models.teacher.teacher_store import SEARCHED, TeacherStore
from rld_lightning.tasks.run.build import adopt_normalisation, set_up
from rld_lightning.tasks.run.checks import check_network
from rld_lightning.tasks.run.fold_and_compile import fold_teacher
from rld_lightning.tasks.run.make import make_data, make_trainer
from rld_lightning.tasks.run.plan import freeze, plan_student, plan_teacher
from rld_lightning.tasks.teacher.cached_logits import open_table, table_path, why_not_cacheable
from rld_lightning.tasks.teacher.fill_cache import fill_table
from rld_lightning.tasks.teacher.network import build_teacher
from rld_lightning.tasks.teacher.weights import find_teacher


def cache(cfg: DictConfig) -> Path:
    """Fills the table from which runs of this configuration read the teacher's logits.

    Runs in one process, on the first device. Further processes, started beside it, share the work.

    Args:
        cfg: of ``conf/fit.yaml``; the settings of the student's training do not matter.

    Returns:
        the file.

    Raises:
        UserError: there is no teacher, the views are unlimited, the disk is full, or the configuration is wrong.
    """
    freeze(cfg)
    with user_errors():
        check_parts(cfg)
        planned = plan_teacher(cfg.model.teacher)
        if planned is None:
            raise ValueError("the model has no teacher whose logits could be kept; choose a pair, as in model=pair.")
        trust(planned.name)
        planned = replace(planned, cache="fill")
        seed_everything(cfg.seed, workers=True, verbose=False)
        data = make_data(cfg.data)
        set_up(data, strong_view=False)
        usual = adopt_normalisation(plan_student(cfg.model.student), data, cfg.data)
        if planned.weights in SEARCHED:  # others determine their own input
            check_network(planned.name, data, other_sizes="image_size" in cfg.data)
        store = TeacherStore(Path(cfg.paths.teachers))
        weights = find_teacher(planned, data.name, store)
        if weights is None:
            raise ValueError(
                f"the teacher {planned.name} is not in {store.path(data.name, planned.name)}; name its file with "
                "model.teacher.weights=, or train it first."
            )
        planned, trainer = replace(planned, weights=weights), make_trainer(cfg.trainer, logger=False)
        teacher, _, sha256 = build_teacher(planned, data, usual)
        planned = replace(planned, sha256=sha256)
        if planned.options["fuse"] == "auto":
            fold_teacher(teacher, KDLoss(), data)  # as for any loss that uses logits only
        if reason := why_not_cacheable(teacher, trainer, data):
            raise ValueError(f"the teacher's logits cannot be kept: {reason}.")
        table = open_table(table_path(teacher, planned, data, trainer, store), planned, data)
        assert table is not None
        teacher.use_table(table)
    fill_table(teacher, data, trainer)
    return table.path
