"""Callbacks that monitor training, compared with independent recounts."""

import pandas as pd
import pytest
import torch
from helpers.training import job, linear, quiet_trainer
from lightning.pytorch import Callback
from torch import nn

from rld_lightning import FrozenTeacher, KDLoss
from rld_lightning.callbacks import ClassAccuracy, GradientNorm, TeacherMonitor, Throughput
from rld_lightning.data import DigitsDataModule


def run(tmp_path, *callbacks, epochs=2, teacher=None, eval_batch_size=256, **options):
    module = job(linear(0), KDLoss(), teacher=teacher or FrozenTeacher(linear(1)))
    trainer = quiet_trainer(*callbacks, max_epochs=epochs, default_root_dir=tmp_path, **options)
    trainer.fit(module, DigitsDataModule(batch_size=128, eval_batch_size=eval_batch_size))
    return trainer, module


def test_teacher_monitor_matches_a_recount(tmp_path):
    trainer, module = run(tmp_path, TeacherMonitor())
    right = agree = seen = alone = 0
    with torch.no_grad():
        for batch in trainer.datamodule.val_dataloader():
            teacher, student = module.teacher(batch.images)[0].argmax(1), module.student(batch.images).argmax(1)
            right += (teacher == batch.label).sum().item()
            agree += (teacher == student).sum().item()
            alone += ((teacher != batch.label) & (student == batch.label)).sum().item()
            seen += len(batch.label)
    assert trainer.callback_metrics["val/teacher_top1"].item() == pytest.approx(100 * right / seen, rel=1e-5)
    assert trainer.callback_metrics["val/agreement"].item() == pytest.approx(100 * agree / seen, rel=1e-5)
    assert trainer.callback_metrics["val/top1_teacher_wrong"].item() == pytest.approx(100 * alone / (seen - right))
    assert 0 < trainer.callback_metrics["train/agreement"] <= 100
    assert 0 < trainer.callback_metrics["train/top1_teacher_wrong"] < 100


def test_accuracy_where_the_teacher_is_wrong_is_absent_if_it_never_is(tmp_path):
    class Oracle(FrozenTeacher):
        def forward(self, images, paths=(), **_):
            return torch.nn.functional.one_hot(self.answers.pop(0), 10).float(), {}

    class Tell(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.teacher.answers = [batch.label]

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            pl_module.teacher.answers = [batch.label]

    trainer, _ = run(tmp_path, Tell(), TeacherMonitor(), epochs=1, teacher=Oracle(linear(1)))
    assert trainer.callback_metrics["val/teacher_top1"] == trainer.callback_metrics["train/teacher_top1"] == 100
    assert not [name for name in trainer.callback_metrics if name.endswith("top1_teacher_wrong")]


def test_class_accuracy_matches_a_recount_for_student_and_teacher(tmp_path):
    trainer, module = run(tmp_path, TeacherMonitor(), ClassAccuracy(tmp_path))
    batches = list(trainer.datamodule.val_dataloader())
    label = torch.cat([batch.label for batch in batches])
    images = torch.cat([batch.images for batch in batches])
    table = pd.read_csv(tmp_path / "classes.csv", dtype={"class": str})
    assert table["class"].tolist() == trainer.datamodule.class_names
    assert table["images"].tolist() == label.bincount().tolist()
    with torch.no_grad():
        predictions = {"accuracy": module.student(images), "teacher_accuracy": module.teacher(images)[0]}
    for column, logits in predictions.items():
        right = logits.argmax(1) == label
        expected = [100 * right[label == c].float().mean().item() for c in range(10)]
        assert table[column].tolist() == pytest.approx(expected, rel=1e-4)
    # The image-weighted mean over the classes is the accuracy.
    mean = (table["accuracy"] * table["images"]).sum() / table["images"].sum()
    assert mean == pytest.approx(trainer.callback_metrics["val/top1"].item(), rel=1e-4)


def test_class_tables_of_short_epochs_are_written_when_the_run_ends_or_stops(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("rld_lightning.callbacks.class_accuracy.write_csv", lambda path, _: written.append(path.name))
    both = ["classes.csv", "confusion.csv"]
    run(tmp_path, ClassAccuracy(tmp_path), epochs=3)
    assert written == 2 * both, "after the first epoch and at the end"

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.current_epoch == 2:
                raise SystemExit

    del written[:]
    with pytest.raises(SystemExit):
        run(tmp_path, ClassAccuracy(tmp_path), Stop(), epochs=3)
    assert written == 2 * both
    monkeypatch.setattr("rld_lightning.callbacks.class_accuracy._SECONDS", 0)
    del written[:]
    run(tmp_path, ClassAccuracy(tmp_path), epochs=3)
    assert written == 3 * both


def test_class_accuracy_without_teacher_predictions_and_without_images_of_a_class(tmp_path):
    run(tmp_path, ClassAccuracy(tmp_path), epochs=1, limit_val_batches=1, eval_batch_size=4)
    table = pd.read_csv(tmp_path / "classes.csv")
    assert list(table) == ["class", "images", "accuracy"]
    assert table["images"].sum() == 4
    assert table["accuracy"].isna().tolist() == (table["images"] == 0).tolist()


class Norms(Callback):
    """Computes the norms from the parameters, in double precision."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = torch.cat([p.grad.double().flatten() for p in pl_module.parameters()])
        self.norms.append(gradients.square().sum().sqrt().item())


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.01}, {"accumulate_grad_batches": 4}])
def test_gradient_norm_is_the_epoch_mean_before_clipping(tmp_path, options):
    norms = Norms()
    trainer, _ = run(tmp_path, norms, GradientNorm(), epochs=1, **options)
    assert len(norms.norms) == trainer.global_step == (3 if "accumulate_grad_batches" in options else 12)
    assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(sum(norms.norms) / len(norms.norms))
    assert trainer.callback_metrics["train/grad_norm"] > 0.01


def test_gradient_norm_excludes_steps_that_the_scaler_skips():
    class Module:
        def log(self, name, value):
            self.logged = {name: value}

    parameter = nn.Parameter(torch.zeros(2))
    optimizer, module, callback = torch.optim.SGD([parameter]), Module(), GradientNorm()
    callback.on_train_epoch_start(None, module)
    for gradient in ([3.0, 4.0], [float("inf"), 0.0], [0.0, 1.0], [float("nan"), 0.0]):
        parameter.grad = torch.tensor(gradient)
        callback.on_before_optimizer_step(None, module, optimizer)
    callback.on_train_epoch_end(None, module)
    assert module.logged == {"train/grad_norm": 3.0}


def test_teacher_runs_once_on_validation_images(tmp_path):
    class Counting(FrozenTeacher):
        images = 0

        def forward(self, images, paths=(), **_):
            self.images += len(images)
            return super().forward(images, paths)

    teacher = Counting(linear(1))
    run(tmp_path, TeacherMonitor(), epochs=3, teacher=teacher)
    assert teacher.images == 3 * 1437 + 360


class Clock(Callback):
    """A fake clock: a training step takes 0.1 s, validation and the first step a minute."""

    def __init__(self):
        self.now = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now += 0.1 if batch_idx else 60

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.now += 60


class Saves(Callback):
    """Saves after a few steps, which takes a minute each time."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx in (2, 3, 7):
            trainer.save_checkpoint(trainer.default_root_dir + "/some.ckpt")
            self.clock.now += 60


@pytest.mark.parametrize(("window", "saves"), [(1, False), (5, False), (100, False), (5, True)])
def test_throughput_counts_training_steps_only(tmp_path, monkeypatch, window, saves):
    clock = Clock()
    monkeypatch.setattr("rld_lightning.callbacks.throughput.clock", lambda device: clock.now)
    trainer, _ = run(tmp_path, Throughput(window), clock, *([Saves(clock)] if saves else []))
    # 1,437 images in steps of 128: eleven timed steps, ten of them whole and the last of 29.
    assert trainer.callback_metrics["train/images_per_s"].item() == pytest.approx((10 * 128 + 29) / 1.1, rel=1e-5)
