"""What is watched while training, against a recount."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from rld_lightning import DistillationModule, FrozenTeacher, KDLoss
from rld_lightning.callbacks import TeacherMonitor, Throughput
from rld_lightning.data import DigitsDataModule


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


def run(tmp_path, *callbacks, epochs=2, teacher=None):
    teacher = teacher or FrozenTeacher(network(1))
    module = DistillationModule(
        network(0), KDLoss(), lambda parameters: torch.optim.SGD(parameters, lr=0.1), teacher=teacher, num_classes=10
    )
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DigitsDataModule(batch_size=128))
    return trainer, module


def test_teacher_monitor_recounts(tmp_path):
    trainer, module = run(tmp_path, TeacherMonitor())
    right = agree = seen = 0
    with torch.no_grad():
        for batch in trainer.datamodule.val_dataloader():
            teacher, student = module.teacher(batch.images)[0].argmax(1), module.student(batch.images).argmax(1)
            right += (teacher == batch.label).sum().item()
            agree += (teacher == student).sum().item()
            seen += len(batch.label)
    assert trainer.callback_metrics["val/teacher_top1"].item() == pytest.approx(100 * right / seen, rel=1e-5)
    assert trainer.callback_metrics["val/agreement"].item() == pytest.approx(100 * agree / seen, rel=1e-5)
    assert 0 < trainer.callback_metrics["train/agreement"] <= 100


def test_the_teacher_sees_validation_images_once(tmp_path):
    class Counting(FrozenTeacher):
        images = 0

        def forward(self, images, paths=()):
            self.images += len(images)
            return super().forward(images, paths)

    teacher = Counting(network(1))
    run(tmp_path, TeacherMonitor(), epochs=3, teacher=teacher)
    assert teacher.images == 3 * 1437 + 360


class Clock(Callback):
    """A clock of its own: a training step takes a tenth of a second, validation and the first step a minute."""

    def __init__(self):
        self.now = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now += 0.1 if batch_idx else 60

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.now += 60


@pytest.mark.parametrize("window", [1, 5, 100])
def test_throughput_counts_training_steps_only(tmp_path, monkeypatch, window):
    clock = Clock()
    monkeypatch.setattr("rld_lightning.callbacks.throughput._now", lambda trainer: clock.now)
    trainer, _ = run(tmp_path, clock, Throughput(window))
    # 1,437 images in steps of 128: eleven timed steps, ten of them whole and the last of 29.
    assert trainer.callback_metrics["train/images_per_s"].item() == pytest.approx((10 * 128 + 29) / 1.1, rel=1e-5)
