"""Altered checkpoints are refused in one sentence before training."""

import copy
from functools import partial

import pytest
import torch
from helpers.training import job, linear, quiet_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import OmegaConf

from rld_lightning.callbacks import (
    ExactResume,
    GradientNorm,
    LastCheckpoint,
    MetricsFile,
    OwnSettings,
    TeacherMonitor,
    Throughput,
    WeightAverage,
)
from rld_lightning.data import DigitsDataModule
from rld_lightning.errors import UserError
from rld_lightning.runs.checkpoint import write_checkpoint

NAN = torch.full((10, 192), float("nan"))
LOOPS = ("loops", "fit_loop")
STEPS = (*LOOPS, "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total", "completed")
GONE = object()


class StopAfter(Callback):
    """Stops a run after a number of batches."""

    def __init__(self, batches):
        self.left = batches

    def on_train_batch_end(self, trainer, *_):
        self.left -= 1
        trainer.should_stop = trainer.should_stop or self.left == 0


def fit(folder, resume=None, batches=None, lr=0.1, more=()):
    """Trains with accumulated gradients, a schedule and an average: 6 batches per epoch, 3 steps."""
    scheduler = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[4])
    module = job(linear(), lr=lr, momentum=0.9, scheduler=scheduler, scheduler_interval="step")
    watchers = [TeacherMonitor(), GradientNorm(), Throughput(), EarlyStopping("val/ce", patience=9)]
    own = OwnSettings(OmegaConf.create({"model": {"teacher": None}, "recipe": {"optimizer": {"lr": lr}}}))
    more = more if batches is None else [StopAfter(batches)]
    callbacks = [*watchers, WeightAverage(decay=0.9), ExactResume(), own, *more, LastCheckpoint(folder)]
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "logger": MetricsFile(folder)}
    trainer = quiet_trainer(*callbacks, default_root_dir=folder, **options)
    trainer.fit(module, DigitsDataModule(batch_size=240), ckpt_path=resume, weights_only=True)
    return trainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns the checkpoint of a run stopped after 10 batches: one epoch, and 4 batches of the next."""
    folder = tmp_path_factory.mktemp("run")
    fit(folder, batches=10)
    return torch.load(folder / "last.ckpt", weights_only=True)


def put(checkpoint, path, value):
    """Returns a checkpoint with an entry replaced or removed."""
    altered = at = copy.deepcopy(checkpoint)
    for key in path[:-1]:
        at = at[key]
    if value is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return altered


def test_unaltered_checkpoint_is_resumed(checkpoint, tmp_path):
    write_checkpoint(checkpoint, tmp_path / "last.ckpt", keep=False)
    assert fit(tmp_path, tmp_path / "last.ckpt").global_step == 9


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("state_dict",), GONE, "state_dict is missing, and has to be a dictionary"),
        (("state_dict", "student.1.weight"), GONE, r"student\.1\.weight is missing, and .* of shape \(10, 192\)"),
        (("state_dict", "student.1.weight"), NAN, "not all finite, and has to be finite"),
        (("state_dict", "student.1.bias"), torch.zeros(9), r"of shape \(9,\), and has to be .* of shape \(10,\)"),
        (("state_dict", "student.2.bias"), torch.zeros(9), "'student.2.bias' is there, and this run has no such"),
        (("current_model_state", "student.1.weight"), NAN, r"current_model_state\.student\.1\.weight is fractions"),
        (("current_model_state",), GONE, "current_model_state is missing"),
        (("averaging_state",), GONE, "averaging_state is missing"),
        (("best_top1",), float("nan"), "best_top1 is nan, and has to be a number"),
        (("hyper_parameters", "num_classes"), 11, "num_classes is 11, and has to be 10"),
        (("callbacks",), GONE, "callbacks is missing"),
        (("callbacks", "EarlyStopping{'monitor': 'val/ce', 'mode': 'min'}"), GONE, r"\.wait_count is missing"),
        (("callbacks", "GradientNorm", "totals"), "x", "totals is 'x', and has to be finite fractions"),
        (("callbacks", "ExactResume", "seconds"), "x", "seconds is 'x', and has to be a number"),
        (("epoch_so_far", "means"), [{"a": torch.zeros(2)}], "contain other values than single numbers"),
        (("optimizer_states",), [], r"optimizer_states is a list, and has to be a list of 1"),
        (("optimizer_states", 0, "state"), {}, "is empty, and has to have what SGD remembers"),
        (("optimizer_states", 0, "state", 0, "momentum_buffer"), torch.zeros(10), r"state\.0\.momentum_buffer is"),
        (("optimizer_states", 0, "state", 0, "momentum_buffer"), NAN, r"momentum_buffer is .*, not all finite"),
        (("optimizer_states", 0, "state", 7), {}, "has an entry 7, and this run has 2 parameters"),
        (("optimizer_states", 0, "state", 1), GONE, r"optimizer_states have \[1\] entries, and had \[2\] when they"),
        (("optimizer_states", 0, "param_groups", 0, "initial_lr"), 1.0, r"began with the .* \[1\.0\], .* \[0\.1\]"),
        (("lr_schedulers", 0, "base_lrs"), [1.0], r"base_lrs of lr_schedulers is \[1\.0\], .* began with \[0\.1\]"),
        (("optimizer_states", 0, "param_groups", 0, "momentum"), 0.5, "momentum is 0.5, and has to be 0.9"),
        (("optimizer_states", 0, "param_groups", 0, "lr"), float("inf"), "lr is inf, and has to be a number"),
        (("lr_schedulers",), [], "lr_schedulers is a list, and has to be a list of 1"),
        (("lr_schedulers", 0, "last_epoch"), 3, "last_epoch is 3, and has to be 5 by its other counts"),
        (("global_step",), 4, "global_step is 4, and has to be 5 by its other counts"),
        (STEPS, 50, "epoch_loop.automatic_optimization is 50, and has to be 5"),
        ((*LOOPS, "epoch_progress", "current", "completed"), 2, "and has to be .* by its other counts"),
        ((*LOOPS, "epoch_loop.batch_progress"), GONE, "epoch_loop.batch_progress is missing"),
        ((*LOOPS, "epoch_loop.batch_progress", "current", "processed"), 9, "is 9, and has to be at most 6"),
        (("DigitsDataModule", "batch"), 1, "number of batches is 7, and has to be 10"),
        (("metrics", 0, "epoch"), 5, r"metrics\[0\]\.epoch is 5, and the run has begun 2"),
        (("optimizer_states", 0, "param_groups", 0, "lr"), 1.0, r"the learning rates \[1\.0\], .* last set to \[0\.01"),
        (("DigitsDataModule",), 0.5, "DigitsDataModule is 0.5, and has to be a dictionary"),
        (("DigitsDataModule", "batch"), [1], "DigitsDataModule.batch is a list, and has to be a number"),
        (("global_step",), 10**400, "global_step is 10+, and has to be a number"),
        (("callbacks", "ExactResume", "seconds"), -1.0, "seconds is -1.0, and has to be a number, 0 or more"),
        (("best_top1",), 1e9, "best_top1 is 1000000000.0, and has to be a percentage"),
        (("metrics", 0, "train/loss"), 10**400, r"metrics\[0\]\.'train/loss' is 10+, and has to be a number"),
        (("metrics", 0, "train/loss"), "=1", r"metrics\[0\]\.'train/loss' is '=1', and has to be a number"),
    ],
    ids=lambda part: ".".join(map(str, part)) if isinstance(part, tuple) else None,
)  # fmt: skip
def test_altered_checkpoint_is_refused(checkpoint, tmp_path, path, value, words):
    write_checkpoint(put(checkpoint, path, value), tmp_path / "last.ckpt", keep=False)
    with pytest.raises(UserError, match=words) as refused:
        fit(tmp_path, tmp_path / "last.ckpt")
    assert "a new run in another folder." in str(refused.value)
    assert not (tmp_path / "metrics.csv").exists()


def test_initial_rate_must_match_the_settings(checkpoint, tmp_path):
    altered = put(checkpoint, ("optimizer_states", 0, "param_groups", 0, "initial_lr"), 0.2)
    write_checkpoint(put(altered, ("lr_schedulers", 0, "base_lrs"), [0.2]), tmp_path / "last.ckpt", keep=False)
    with pytest.raises(UserError, match=r"began with the learning rates \[0\.2\], and have to begin with \[0\.1\]"):
        fit(tmp_path, tmp_path / "last.ckpt")
    write_checkpoint(checkpoint, tmp_path / "last.ckpt", keep=False)
    (group,) = fit(tmp_path, tmp_path / "last.ckpt", lr=0.2).optimizers[0].param_groups
    assert group["initial_lr"] == pytest.approx(0.2), "another one that the run says is taken"


def test_callbacks_of_ones_own_may_have_set_the_rate(checkpoint, tmp_path):
    altered = put(checkpoint, ("optimizer_states", 0, "param_groups", 0, "lr"), 0.05)
    write_checkpoint(altered, tmp_path / "last.ckpt", keep=False)
    with pytest.raises(UserError, match="last set to"):
        fit(tmp_path, tmp_path / "last.ckpt")
    assert fit(tmp_path, tmp_path / "last.ckpt", more=[StopAfter(-1)]).global_step == 9


def test_previous_checkpoint_is_offered_as_the_way_out(checkpoint, tmp_path):
    write_checkpoint(checkpoint, tmp_path / "last.ckpt", keep=False)
    write_checkpoint(put(checkpoint, ("global_step",), 4), tmp_path / "last.ckpt", keep=True)
    with pytest.raises(UserError, match=rf"resume from {tmp_path}/last\.previous\.ckpt, the one before it, or start"):
        fit(tmp_path, tmp_path / "last.ckpt")


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "Adadelta", "Rprop"])
def test_optimizer_state_is_known_without_values(optimizer):
    from rld_lightning.runs.checkpoint_form import _after_a_step

    student = linear()
    made = getattr(torch.optim, optimizer)(student.parameters(), lr=0.1)
    known = _after_a_step(made, list(student.parameters()))
    assert all(not bool(value.any()) for state in made.state.values() for value in state.values())
    student(torch.rand(2, 3, 8, 8)).sum().backward()
    made.step()
    for parameter, values in zip(student.parameters(), known, strict=True):
        state = made.state[parameter]
        assert {n: v.shape for n, v in state.items() if isinstance(v, torch.Tensor)} == {
            n: v.shape for n, v in values.items() if isinstance(v, torch.Tensor)
        }
