"""Diverging runs are stopped at the step, diagnosed, not saved, and can resume with another learning rate."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.training import job, linear, quiet_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from rld_lightning import CELoss, FrozenTeacher, KDLoss
from rld_lightning.callbacks import Diverged, Divergence
from rld_lightning.callbacks.divergence import _state_is_finite, _Values, diagnose
from rld_lightning.data import DigitsDataModule
from rld_lightning.data.base import Batch


class At(Callback):
    """Modifies the module before one batch, or the batch itself."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.change(module, batch)


def images_of_inf(module, batch):
    batch.images[0] = math.inf


def images_of_nan(module, batch):
    batch.images[0] = math.nan


def spoil_weights(module, batch):
    module.student[1].weight.data[0, 0] = math.nan


class Scaled(CELoss):
    """Cross-entropy, for one step a million times larger."""

    def terms(self, step):
        self.calls = getattr(self, "calls", 0) + 1
        return {"more": step.student.logits.new_tensor(1e6 if self.calls == 8 else 0.0)}


class LastGradient(nn.Module):
    """Identity, with a non-finite gradient in the last step of an epoch of 12."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, values):
        self.calls += self.training
        if self.calls == 12 and values.requires_grad:
            values.register_hook(lambda gradient: gradient * math.nan)
        return values


def fit(tmp_path, *callbacks, loss=None, teacher=None, student=None, every=5, rate=0.1, max_epochs=1, **options):
    module = job(student, loss, lr=rate, momentum=0.9, teacher=teacher, **options)
    watch = Divergence(tmp_path, every=every)
    trainer = quiet_trainer(watch, *callbacks, max_epochs=max_epochs, default_root_dir=tmp_path)
    trainer.fit(module, DigitsDataModule(batch_size=128))  # 12 batches
    return module


def saving(tmp_path, **options):
    return ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False, **options)


def every_step(tmp_path):
    return saving(tmp_path, every_n_train_steps=1)


def finite(path):
    checkpoint = torch.load(path, weights_only=True)
    states = [state for each in checkpoint["optimizer_states"] for state in each["state"].values()]
    tensors = [*checkpoint["state_dict"].values(), *(state["momentum_buffer"] for state in states)]
    return all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil_weights, r"batch 7: the loss is nan at a learning rate of 0\.1\. Resume.*resume=.*last\.ckpt and"),
        (images_of_inf, r"batch 7: the loss is nan, and the normalised images are not finite.*start over"),
        (images_of_nan, r"batch 7: the loss is nan, and the normalised images are not finite"),
    ],
)
def test_non_finite_values_stop_the_run_before_they_are_saved(tmp_path, change, words):
    with pytest.raises(Diverged, match=words):
        fit(tmp_path, At(6, change), every_step(tmp_path))
    assert finite(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
    order = torch.cat([batch.index for batch in _batches()])
    named = np.load(tmp_path / "diverged.npz")
    assert named["index"].tolist() == order[6 * 128 : 7 * 128].tolist()
    assert named["index_before"].tolist() == order[5 * 128 : 6 * 128].tolist()
    assert named["label"].shape == named["label_before"].shape == (128,)


def test_learning_rate_is_that_of_the_step_not_of_the_reading(tmp_path):
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    with pytest.raises(Diverged, match=rf"batch 7: the loss is nan at a learning rate of {0.1 / 2**6:.3g}\."):
        fit(tmp_path, At(6, spoil_weights), scheduler=schedule, scheduler_interval="step")  # read after batch 10


def test_full_disk_does_not_hide_the_diagnosis(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(Diverged, match=r"training diverged.*Nothing of it was saved\.$"):
        fit(tmp_path, At(6, spoil_weights), every_step(tmp_path))


def test_teacher_of_mixed_images_is_compared_with_the_majority_class(tmp_path):
    watch, label = Divergence(tmp_path), torch.arange(10)
    outputs = {"terms": {"kd": torch.tensor(math.nan)}, "student_logits": torch.eye(10), "label": label}
    batch = Batch(torch.zeros(10, 3, 8, 8), label.roll(1), label)
    watch.on_train_batch_end(
        SimpleNamespace(current_epoch=0),
        SimpleNamespace(rate=0.1),
        outputs | {"teacher_logits": torch.eye(10)},
        batch,
        0,
    )
    assert watch.rows[0][1] == 10


def _batches():
    data = DigitsDataModule(batch_size=128)
    data.setup("fit")
    return data.train_dataloader()


def test_values_are_read_every_few_steps_if_nothing_is_saved(tmp_path):
    steps = []
    count = At(-1, None)
    count.on_train_batch_start = lambda trainer, *_: steps.append(trainer.global_step)
    with pytest.raises(Diverged, match=r"batch 7: .*Start over with a smaller recipe\.optimizer\.lr"):
        fit(tmp_path, At(6, spoil_weights), count)
    assert steps[-1] == 9


def test_values_are_read_at_the_same_steps_of_each_epoch(tmp_path, monkeypatch):
    steps, read = [], Divergence._read

    def spy(self, trainer, module, *, state=False):
        if not state:
            steps.append(trainer.global_step)
        read(self, trainer, module, state=state)

    monkeypatch.setattr(Divergence, "_read", spy)
    fit(tmp_path, max_epochs=2)
    assert steps == [5, 10, 12 + 5, 12 + 10], "those after which the throughput is read"


def test_weights_are_checked_once_per_step(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr("rld_lightning.callbacks.divergence._state_is_finite", lambda *_: looks.append(1) or True)
    fit(tmp_path, saving(tmp_path, save_on_train_epoch_end=True), max_epochs=3)
    assert len(looks) == 3, "before the validation, and not again at the epoch's end and for the checkpoint"


@pytest.mark.parametrize(("value", "expected"), [(0.0, True), (1e30, True), (math.inf, False), (math.nan, False)])
def test_weights_of_any_size_are_finite(value, expected):
    """The norm of 1e30 is not finite in float32."""
    student = linear()
    student[1].weight.data[5, 7] = value
    assert _state_is_finite(SimpleNamespace(optimizers=[]), student) is expected


def test_last_gradient_of_an_epoch_is_neither_saved_nor_best(tmp_path):
    student = nn.Sequential(linear(), LastGradient())
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val/top1", mode="max", save_weights_only=True)
    with pytest.raises(Diverged, match=r"epoch 1, batch 12: the weights are not finite after it"):
        fit(tmp_path, best, saving(tmp_path, save_on_train_epoch_end=True), student=student, every=1000)
    assert not list(tmp_path.glob("*.ckpt"))


def test_broken_teacher_is_distinguished_from_the_learning_rate(tmp_path):
    broken = linear(1)
    broken[1].bias.data[3] = math.nan
    with pytest.raises(Diverged, match=r"the loss is nan .*the teacher's logits are not finite.* Choose another model"):
        fit(tmp_path, loss=KDLoss(), teacher=FrozenTeacher(broken))


def seen(**values):
    usual = {"loss": math.nan, "images": 2.5, "student": math.inf, "teacher": 9.0, "right": 90.0}
    return _Values(**{**usual, "terms": {"ce": math.nan, "kd": 2.0}, **values})


@pytest.mark.parametrize(
    ("values", "words", "begin_anew"),
    [
        (seen(), "the loss is nan (ce nan) at a learning rate of 0.1", False),
        (seen(right=1.0), "gets 1 of the batch's 100 images right, which is chance", True),
        (seen(right=-1.0, teacher=0.0), "at a learning rate of 0.1", False),
        (seen(images=3e7), "the normalised images reach 3e+07", True),
        (None, "the weights are not finite after it, at a learning rate of 0.1", False),
    ],
)
def test_causes(values, words, begin_anew):
    cause, remedy = diagnose(values, rate=0.1, classes=100, images=100)
    assert words in cause
    assert (remedy is not None) == begin_anew


def test_half_correct_is_chance_for_two_classes_and_most_correct_is_not():
    for right, chance in ((32, True), (36, True), (48, False)):
        cause, _ = diagnose(seen(right=right), rate=0.1, classes=2, images=64)
        assert ("chance" in cause) == chance


def test_spike_is_printed_once_per_epoch_and_training_continues(tmp_path, capsys):
    fit(tmp_path, loss=Scaled(), max_epochs=2)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert "epoch 1, batch 8: 1e+06, up from 2." in line


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_ordinary_run_prints_no_spike(tmp_path, capsys, rate):
    fit(tmp_path, rate=rate, max_epochs=2)
    assert capsys.readouterr().out == ""
