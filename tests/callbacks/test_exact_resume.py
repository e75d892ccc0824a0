"""A run stopped at any step and resumed equals the uninterrupted run: weights and metrics, bit for bit."""

import copy
import itertools
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from helpers.training import job, quiet_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from rld_lightning import FrozenTeacher, KDLoss
from rld_lightning.callbacks import (
    ExactResume,
    GradientNorm,
    LastCheckpoint,
    MetricsFile,
    StepSeed,
    TeacherMonitor,
    WeightAverage,
)
from rld_lightning.callbacks.exact_resume import has_stopped_early
from rld_lightning.data import DigitsDataModule
from rld_lightning.trainer_callbacks import callbacks_of

BATCHES = 6  # an epoch
SCHEDULES = {
    "none": (None, "epoch"),
    "step": (partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1, 2], gamma=0.1), "epoch"),
    "onecycle": (partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1), "step"),
    "cosine": (partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=3 * BATCHES), "step"),
}


def network(seed, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Dropout(dropout), nn.Linear(16, 10))


class Diary(Callback):
    """Records every batch, and stops after a given number."""

    def __init__(self, stop):
        self.batches, self.stop = [], stop

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx, batch.index.tolist()))
        trainer.should_stop = trainer.should_stop or self.stop == len(self.batches)


def fit(folder, *callbacks, schedule="none", resume=None, data=None, **options):
    diary = Diary(options.pop("stop_after", None))
    make_scheduler, interval = SCHEDULES[schedule]
    schedules = {"scheduler": make_scheduler, "scheduler_interval": interval}
    student, teacher = network(0, dropout=0.3), FrozenTeacher(network(1))
    module = job(student, KDLoss(), momentum=0.9, teacher=teacher, **schedules)
    last = LastCheckpoint(folder)
    watchers = [diary, StepSeed(0), TeacherMonitor(), GradientNorm(), ExactResume(), *callbacks, last]
    usual = {"max_epochs": 3, "default_root_dir": folder, "logger": MetricsFile(folder)}
    trainer = quiet_trainer(*watchers, **usual | options)
    data = data or DigitsDataModule(batch_size=240)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer, module, diary


def state(trainer, module):
    """Returns all state that determines the next step."""
    optimizer = trainer.optimizers[0].state_dict() if trainer.optimizers else {}
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return copy.deepcopy((module.state_dict(), optimizer, schedules, module.best_top1, trainer.global_step))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def check(whole, *parts):
    (trainer, module, diary), (last_trainer, last_module, _) = whole, parts[-1]
    assert [batch for part in parts for batch in part[2].batches] == diary.batches
    assert equal(state(last_trainer, last_module), state(trainer, module))
    assert last_trainer.logger.rows == trainer.logger.rows
    assert metrics_file(last_trainer) == metrics_file(trainer)


def metrics_file(trainer):
    return (Path(trainer.logger.save_dir) / "metrics.csv").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns the uninterrupted run with a schedule."""
    return cache(lambda schedule: fit(tmp_path_factory.mktemp(schedule), schedule=schedule))


def mostly_slow(fast, *values):
    """All combinations, most of them marked slow."""
    combinations = itertools.product(*values)
    return [pytest.param(*each, marks=() if each in fast else pytest.mark.slow) for each in combinations]


FAST = [("onecycle", 8)]


@pytest.mark.parametrize(("schedule", "stop"), mostly_slow(FAST, SCHEDULES, range(1, 18)))
def test_run_stopped_after_a_step_resumes_with_the_next(tmp_path, whole, schedule, stop):
    first = fit(tmp_path, schedule=schedule, stop_after=stop)
    assert len(first[2].batches) == stop
    check(whole(schedule), first, fit(tmp_path, schedule=schedule, resume=tmp_path / "last.ckpt"))


FAST = [("step", (2, 9, 12))]


@pytest.mark.parametrize(
    ("schedule", "stops"), mostly_slow(FAST, ["none", "step"], [(4,), (6,), (7, 9, 12), (2, 3, 17), (2, 9, 12)])
)
def test_run_limited_by_steps_can_be_extended(tmp_path, whole, schedule, stops):
    parts, resume = [], None
    for stop in (*stops, -1):
        parts.append(fit(tmp_path, schedule=schedule, max_steps=stop, resume=resume))
        resume = tmp_path / "last.ckpt"
    check(whole(schedule), *parts)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 15))
def test_extended_run_equals_one_with_that_limit_from_the_start(tmp_path, first):
    at_once = fit(tmp_path / "at once", schedule="step", max_steps=15)
    start = fit(tmp_path / "first", schedule="step", max_steps=first)
    rest = fit(tmp_path, schedule="step", max_steps=15, resume=tmp_path / "first" / "last.ckpt")
    check(at_once, start, rest)


EVERY, HALVES, SECOND = {}, {"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}
FAST = [(6, EVERY), (9, HALVES)]


@pytest.mark.thinned(2)
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("step", "options"), mostly_slow(FAST, range(1, 19), [EVERY, HALVES, SECOND]))
def test_checkpoint_of_any_callback_can_be_resumed(tmp_path, step, options):
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(tmp_path / "whole", every, schedule="onecycle", **options)
    rest = fit(tmp_path / "rest", schedule="onecycle", resume=tmp_path / f"step={step}.ckpt", **options)
    trainer, module, diary = whole
    assert rest[2].batches == diary.batches[step:]
    assert equal(state(*rest[:2]), state(trainer, module))
    assert metrics_file(rest[0]) == metrics_file(trainer)


def test_epoch_cut_short_is_resumed_from_a_checkpoint_of_its_end(tmp_path, whole):
    end = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    first = fit(tmp_path / "first", end, schedule="step", max_steps=8)
    check(whole("step"), first, fit(tmp_path / "rest", schedule="step", resume=tmp_path / "end.ckpt"))


def test_stop_waits_for_the_accumulated_optimizer_step(tmp_path):
    options = {"accumulate_grad_batches": 4, "schedule": "onecycle"}
    at_once = fit(tmp_path / "at once", **options)
    first = fit(tmp_path, stop_after=8, **options)  # of 6 batches an epoch, which the optimizer steps after 4 and 6
    assert [batch[:2] for batch in first[2].batches][-1] == (1, 3)
    check(at_once, first, fit(tmp_path, resume=tmp_path / "last.ckpt", **options))


@pytest.mark.parametrize("average", [{"decay": 0.9}, pytest.param({}, marks=pytest.mark.slow)])
def test_averaged_weights_are_resumed_and_are_the_final_weights(tmp_path, average):
    at_once = fit(tmp_path / "at once", WeightAverage(**average), schedule="onecycle")
    resume = tmp_path / "last.ckpt"
    first = fit(tmp_path, WeightAverage(**average), schedule="onecycle", stop_after=14)
    check(at_once, first, fit(tmp_path, WeightAverage(**average), schedule="onecycle", resume=resume))
    again = fit(tmp_path / "again", WeightAverage(**average), schedule="onecycle", resume=resume)
    assert again[2].batches == []  # nothing is left to train
    assert equal(again[1].state_dict(), at_once[1].state_dict())
    last, copy = (torch.load(f / "last.ckpt", weights_only=True) for f in (tmp_path, tmp_path / "again"))
    assert equal(copy["current_model_state"], last["current_model_state"])
    assert not equal(last["state_dict"], last["current_model_state"])
    (clock,) = callbacks_of(again[0], ExactResume)
    assert clock.seconds == clock.seconds > 0  # that of the first runs: nothing was trained


@pytest.mark.slow
def test_early_stopped_run_is_not_continued(tmp_path):
    stop = {"monitor": "val/top1", "mode": "max", "min_delta": 100.0, "patience": 1}
    first = fit(tmp_path, EarlyStopping(**stop))
    assert len(first[2].batches) == 2 * BATCHES
    again = fit(tmp_path / "again", EarlyStopping(**stop), resume=tmp_path / "last.ckpt")
    assert again[2].batches == []
    assert equal(again[1].state_dict(), first[1].state_dict())
    assert has_stopped_early(again[0])
