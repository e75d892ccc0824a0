"""Averaged weights: their values, where they are used, and how they are resumed."""

from copy import deepcopy

import pytest
import torch
from helpers.training import job, quiet_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from rld_lightning.callbacks import WeightAverage
from rld_lightning.data import DigitsDataModule
from rld_lightning.losses import KDLoss
from rld_lightning.models.teacher.frozen import FrozenTeacher

EPOCHS, STEPS = 4, 3


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


class Watcher(Callback):
    """Records the weights after each step and those that are validated."""

    def __init__(self):
        self.trained, self.validated, self.teachers = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained.append(deepcopy(pl_module.student.state_dict()))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validated.append(deepcopy(pl_module.student.state_dict()))


def fit(folder, average, epochs=EPOCHS, others=(), **options):
    torch.manual_seed(0)
    student, teacher = network(), FrozenTeacher(network())
    module = job(student, KDLoss(), teacher=teacher)
    watcher = Watcher()
    best = ModelCheckpoint(folder, "best", monitor="val/top1", mode="max", save_weights_only=True)
    last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True)
    trainer = quiet_trainer(average, watcher, best, last, *others, max_epochs=epochs)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=500, eval_batch_size=360), **options)
    return module, watcher


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def floats(weights):
    return {name: value for name, value in weights.items() if value.is_floating_point()}


def test_moving_average_matches_its_formula_and_is_used(tmp_path):
    module, watcher = fit(tmp_path, WeightAverage(decay=0.7))
    expected = floats(watcher.trained[0])
    history = [expected]
    for n, weights in enumerate(floats(w) for w in watcher.trained[1:]):
        decay = min(0.7, (2 + n) / (11 + n))
        expected = {name: decay * value + (1 - decay) * weights[name] for name, value in expected.items()}
        history.append(expected)
    assert decay < 0.7 < (1 + EPOCHS * STEPS) / 10  # neither of the two throughout
    close(floats(module.student.state_dict()), expected)  # what is exported
    for epoch, validated in enumerate(watcher.validated):
        close(floats(validated), history[(epoch + 1) * STEPS - 1])
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for key, weights in (("state_dict", expected), ("current_model_state", watcher.trained[-1])):
        saved = {name: last[key][f"student.{name}"] for name in weights}
        close(saved, weights)
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    epoch = best["global_step"] - 1
    close({name: best["state_dict"][f"student.{name}"] for name in expected}, history[epoch])
    assert "current_model_state" not in best
    assert module.is_validated()
    assert module.student[1].num_batches_tracked == EPOCHS * STEPS


def test_mean_over_epochs_starts_where_it_should_and_does_not_exist_before(tmp_path):
    module, watcher = fit(tmp_path, WeightAverage(start=0.5))
    ends = watcher.trained[STEPS - 1 :: STEPS]
    for epoch in (0, 1):
        close(watcher.validated[epoch], ends[epoch])
    mean = {name: (ends[2][name] + ends[3][name]) / 2 for name in floats(ends[2])}
    close(floats(watcher.validated[3]), mean)
    close(floats(module.student.state_dict()), mean)


def test_run_that_ends_before_averaging_keeps_its_weights(tmp_path):
    module, watcher = fit(tmp_path, WeightAverage(start=0.9), epochs=1)
    close(dict(module.student.state_dict()), watcher.trained[-1])


class Saver(Callback):
    """Saves before and within the validation of the second epoch, as a stopped run does."""

    def __init__(self, folder):
        self.folder = folder

    def on_validation_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.folder / "before.ckpt")

    def on_validation_batch_end(self, trainer, *_):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.folder / "within.ckpt")


def test_checkpoint_within_a_validation_does_not_confuse_average_and_weights(tmp_path):
    fit(tmp_path, WeightAverage(decay=0.7), epochs=2, others=[Saver(tmp_path)])
    before, within = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("before", "within"))
    for key in ("state_dict", "current_model_state"):
        close(floats(within[key]), floats(before[key]))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("decay", [0.9, None])
def test_resumed_average_is_equal(tmp_path, decay):
    whole, _ = fit(tmp_path / "whole", WeightAverage(decay))
    fit(tmp_path / "half", WeightAverage(decay), epochs=2)
    goes_on = {"ckpt_path": tmp_path / "half" / "last.ckpt", "weights_only": True}
    resumed, _ = fit(tmp_path / "more", WeightAverage(decay), **goes_on)
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name


def test_teacher_is_not_copied(tmp_path):
    average = WeightAverage(decay=0.9)
    module, _ = fit(tmp_path, average, epochs=1)
    assert module.teacher is not None
    assert average._average_model.module.teacher is None
    assert module.is_validated()
    with torch.no_grad():
        module.student[1].running_mean += 0.1
    assert not module.is_validated()  # and so a summary would measure it again


@pytest.mark.parametrize(("options", "word"), [({"decay": 1.0}, "decay=1.0"), ({"start": 1.0}, "start=1.0")])
def test_values_out_of_range_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        WeightAverage(**options)
