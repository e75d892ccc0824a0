"""Trains a student, with or without a teacher, and writes a self-contained run directory."""

import gc
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig

from rld_lightning.callbacks import Diverged, StopSignals
from rld_lightning.console import copy_output_to, print_config, print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.distributed import Stopped, external_launcher, requeued, started_by_run, wait_for_all_ranks
from rld_lightning.errors import UserError, disk_errors, user_errors
from rld_lightning.hydra.checks.targets import check_parts
from rld_lightning.hydra.quoting import as_argument
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.losses.connect import connect
from rld_lightning.models.factory import create_model
from rld_lightning.models.imported import trust
from rld_lightning.models.teacher.teacher_store import TeacherStore
from rld_lightning.module import DistillationModule
from rld_lightning.runs.checkpoint import checkpoint_exists
from rld_lightning.runs.files import LAST, LOG, STUDENT, SUMMARY, TEACHER
from rld_lightning.runs.folder import locked
from rld_lightning.runs.naming import class_name, loss_name
from rld_lightning.runs.provenance import command, write_provenance
from rld_lightning.runs.summary import Summary, read_summary
from rld_lightning.tasks.after import Finished, run_follow_ups
from rld_lightning.tasks.run.build import (
    add_run_callbacks,
    adopt_normalisation,
    build_module,
    build_student,
    build_trainer,
    set_up,
)
from rld_lightning.tasks.run.checks import (
    check_loss,
    check_mixtures,
    check_network,
    check_recipe,
    check_start,
    check_trainer,
)
from rld_lightning.tasks.run.describe import describe_run
from rld_lightning.tasks.run.disk_space import check_disk_space
from rld_lightning.tasks.run.fold_and_compile import compile_steps
from rld_lightning.tasks.run.make import AUTO, make_data, suitable_batch
from rld_lightning.tasks.run.plan import (
    Plan,
    Teacher,
    completed_config,
    freeze,
    plan_student,
    plan_teacher,
    with_values,
)
from rld_lightning.tasks.run.processes import processes_to_start, run_in_processes
from rld_lightning.tasks.run.results import summarise, write_results
from rld_lightning.tasks.run.resume import find_checkpoint, print_nothing_left
from rld_lightning.tasks.run.shared_data import reuse_cached_data
from rld_lightning.tasks.run.threads import choose_threads
from rld_lightning.tasks.teacher.cached_logits import cache_logits, cache_validation_logits
from rld_lightning.tasks.teacher.network import build_teacher
from rld_lightning.tasks.teacher.score import measure_teacher
from rld_lightning.tasks.teacher.training_lock import training_turn
from rld_lightning.tasks.teacher.weights import find_teacher, is_reusable, store_teacher, train_teacher
from rld_lightning.tracking import tracked
from rld_lightning.trainer_callbacks import callbacks_of

TASK = "rld_lightning.tasks.fit:fit"


def fit(cfg: DictConfig, *, resume_hint: bool = True) -> Summary:
    """Runs the whole job of ``conf/fit.yaml``, in as many processes as ``cfg.trainer`` requires.

    Args:
        cfg: the composed configuration; it is not modified from here on.
        resume_hint: whether an interrupted run prints how to resume.

    Returns:
        the summary, on all ranks.

    Raises:
        UserError: the configuration or a file that it names is wrong (raised before training starts), or training
            diverged, or one of several processes was lost.
    """
    freeze(cfg)
    with user_errors():
        check_parts(cfg)
        trust(cfg.model.student.name, *([cfg.model.teacher.name] if cfg.model.teacher else []))
        plan = Plan(
            run=Path(cfg.paths.run),
            resume=find_checkpoint(cfg.resume) or _requeued_checkpoint(Path(cfg.paths.run)),
            processes=processes_to_start(cfg.trainer),
            seed=cfg.seed,
            label=cfg.model.label,
            student=plan_student(cfg.model.student),
            teacher=plan_teacher(cfg.model.teacher),
            store=TeacherStore(Path(cfg.paths.teachers)),
            compile=cfg.model.compile,
            capture=cfg.model.capture,
            loss=loss_name(cfg.loss),
            batch_size=None if cfg.data.batch_size == AUTO else cfg.data.batch_size,
            other_sizes="image_size" in cfg.data,
            optimizer=class_name(cfg.recipe.optimizer._target_),
            recipe_rate=cfg.recipe.optimizer.lr,
            scale_lr_from=cfg.recipe.get("scale_lr_from"),
            scheduler_interval=cfg.recipe.scheduler_interval,
            scheduler_monitor=cfg.recipe.get("scheduler_monitor"),
        )
    command()  # stores the command for processes started here to inherit
    with locked(plan.run), disk_errors(), copy_output_to(plan.run / LOG):
        with user_errors():
            plan = replace(plan, before=check_start(plan, cfg))  # early, so that one process reports it, not each rank
        if plan.processes > 1:
            run_in_processes(plan.processes, TASK, cfg)
            return read_summary(plan.run)
        # If ranks were started here, the process that started them prints how to resume.
        return _run(cfg, plan, resume_hint=resume_hint and not started_by_run())


def _requeued_checkpoint(run: Path) -> str | None:
    """Returns this run's checkpoint if SLURM has requeued its job."""
    return str(run / LAST) if requeued() and checkpoint_exists(run / LAST) else None


def fit_in_processes(cfg: DictConfig, *, resume_hint: str | None = None, output: Path | None = None) -> Summary:
    """Runs :func:`fit` in fresh processes, or in those that a launcher has started.

    Args:
        resume_hint: the override that resumes an interrupted run, to be added to the command; by default that of
            the run's kind.
        output: a file for the output of processes started here.

    Raises:
        UserError: as :func:`fit`.
    """
    with user_errors():
        processes = processes_to_start(cfg.trainer)
    if external_launcher() is not None:  # started by SLURM, for example
        return fit(cfg)
    run_in_processes(processes, TASK, cfg, resume_hint=resume_hint, output=output)
    return read_summary(Path(cfg.paths.run))


def _run(cfg: DictConfig, plan: Plan, *, resume_hint: bool) -> Summary:
    """Runs the job in this process, as one of its ranks: checks, finds the teacher, builds, trains, writes results."""
    gc.collect()  # an earlier run of this process, such as the teacher's, leaves data in reference cycles
    with user_errors():
        if cfg.print_config == "tree":
            print_config(cfg)
        seed_everything(plan.seed, workers=True, verbose=False)
        loss: DistillationLoss = instantiate(cfg.loss)
        check_loss(loss, plan.teacher, plan.label)
        check_recipe(instantiate(cfg.recipe.optimizer), instantiate(cfg.recipe.get("scheduler")))
        data = make_data(cfg.data)
        reuse_cached_data(data, cfg.data)
        check_mixtures(loss, data)
        set_up(data, strong_view=loss.needs_strong_view)
        usual = adopt_normalisation(plan.student, data, cfg.data)
        check_network(plan.student.name, data, other_sizes=plan.other_sizes)
    if loss.needs_teacher and plan.teacher is not None:
        with user_errors():
            if plan.teacher.weights in ("auto", "fit", "published"):  # others determine their own input
                check_network(plan.teacher.name, data, other_sizes=plan.other_sizes)
            weights = find_teacher(plan.teacher, data.name, plan.store, plan.before)
        if weights is None:
            for_others = is_reusable(data, plan.teacher.start)
            with training_turn(plan.store, data.name, plan.teacher.name, plan.run, for_others=for_others) as lacks:
                if lacks:
                    _train_teacher(cfg, plan, plan.teacher, loss, data)
            weights = find_teacher(plan.teacher, data.name, plan.store) or str(plan.run / TEACHER / STUDENT)
        plan = replace(plan, teacher=replace(plan.teacher, weights=weights))
    else:
        plan = replace(plan, teacher=None)
    with user_errors():
        trainer = build_trainer(cfg)
        if plan.batch_size is None:
            data.batch_size = _choose_batch(plan, data, trainer)
            plan = replace(plan, batch_size=data.batch_size)
        check_trainer(trainer, cfg.trainer, data)
        teacher = None
        if plan.teacher is not None:
            teacher, facts, sha256 = build_teacher(plan.teacher, data, usual, plan.before)
            plan = replace(plan, teacher=replace(plan.teacher, sha256=sha256))
            cache_validation_logits(teacher, plan, data)
            measure_teacher(teacher, facts, data, trainer)
        # Before the schedule is created, which may refer to the rate.
        recipe = with_values(cfg, {"recipe.optimizer.lr": plan.learning_rate}).recipe
        module = build_module(
            plan, data, loss, teacher, instantiate(recipe.optimizer), instantiate(recipe.get("scheduler"))
        )
        check_disk_space(plan.run, trainer, module)
        cache_logits(module, plan, data, trainer)
        add_run_callbacks(trainer, cfg, plan)
        choose_threads(module, data, trainer)
        compile_steps(module, plan, data, trainer)
    wait_for_all_ranks()
    describe_run(cfg, plan, data, trainer, module)
    final = completed_config(cfg, plan)
    write_provenance(plan.run, final)
    with tracked(trainer, module, final):
        _train(plan, trainer, module, data, resume_hint=resume_hint)
        summary = summarise(plan, trainer, module, data)
        write_results(plan.run, summary, data, module.student)
    run_follow_ups(Finished(cfg, plan, data, module, summary, partial(fit, resume_hint=False)))
    return summary


def _choose_batch(plan: Plan, data: ImageDataModule, trainer: Trainer) -> int:
    """Returns a batch size that suits device and data; that of the checkpoint if the run resumes."""
    before = None if plan.before is None else plan.before.settings.get("data.batch_size")
    if before is not None and before.isdecimal() and 0 < int(before) <= data.train_size:
        return int(before)
    chosen = suitable_batch(data.train_size, trainer.strategy.root_device, trainer.world_size)
    print_line("batch", f"{chosen}, for {data.train_size:,} images on {trainer.strategy.root_device.type}")
    return chosen


def _train_teacher(
    cfg: DictConfig, plan: Plan, teacher: Teacher, loss: DistillationLoss, data: ImageDataModule
) -> None:
    """Trains the missing teacher in ``<run>/teacher``, and stores it for other runs if they can use it."""
    folder = plan.run / TEACHER
    with user_errors():  # before the teacher is trained, networks show that the loss can work with them
        student = build_student(plan.student, data)  # its weights are downloaded, or refused, now
        other = create_model(teacher.name, data.num_classes)
        connect(deepcopy(loss), student, other, data.image_shape, data.train_label)
    if not (folder / SUMMARY).exists():
        place = plan.store.path(data.name, teacher.name)
        why = f"{teacher.name} is not in {place}" if not place.is_file() else f"{place} is damaged"
        if teacher.start is not None:
            why = f"{teacher.name} begins with {teacher.start}"
        print_line("teacher", f"{why}: training it first, with cross-entropy")
    summary = train_teacher(cfg, folder, partial(fit, resume_hint=False))
    store_teacher(summary, folder, plan.store, data, teacher.name, teacher.start)


def _train(
    plan: Plan, trainer: Trainer, module: DistillationModule, data: ImageDataModule, *, resume_hint: bool
) -> None:
    (signals,) = callbacks_of(trainer, StopSignals)
    try:
        with signals.handling():
            trainer.fit(module, datamodule=data, ckpt_path=plan.resume, weights_only=True)
        print_nothing_left(trainer)
    except Diverged:  # its message says how to resume
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        last = plan.run / LAST
        if resume_hint and checkpoint_exists(last):
            print_line("stopped", f"continue with the same command and {as_argument('resume', last)}")
            if isinstance(error, Stopped):
                error.reported = True
        if "metric" in str(error) and "not available" in str(error):  # a loss's own metrics are known only now
            raise UserError(f"a callback or the schedule monitors a metric that is not logged: {error}") from error
        raise
