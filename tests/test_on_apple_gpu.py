"""A run on an Apple GPU trains, validates and saves as on a CPU: nothing in it needs float64 or a missing operator."""

from functools import partial
from unittest import mock

import pytest
import torch
from helpers.configs import compose
from helpers.pretended_apple_gpu import AppleTensor, pretended_apple_gpu
from helpers.training import quiet_trainer
from lightning.pytorch import Callback

import rld_lightning.runs.provenance
from rld_lightning import DistillationModule, FrozenTeacher, RLDLoss, create_model
from rld_lightning.callbacks import Divergence, GradientNorm, LastCheckpoint, StepSeed, TeacherMonitor, Throughput
from rld_lightning.callbacks.weight_average import WeightAverage
from rld_lightning.data import DigitsDataModule
from rld_lightning.errors import UserError
from rld_lightning.hydra.checks.machine import check_machine
from rld_lightning.hydra.resolvers import fast_precision
from rld_lightning.losses import MLKDLoss
from rld_lightning.models.complexity import clock
from rld_lightning.models.teacher.logits_table import LogitsTable
from rld_lightning.tasks.run.results import _peak_memory


@pytest.fixture
def apple_gpu():
    """A pretended Apple GPU that Lightning finds, and a count of the waits for it."""
    waited = mock.Mock()
    with (
        mock.patch("torch.backends.mps.is_available", return_value=True),
        mock.patch("lightning.fabric.accelerators.mps.MPSAccelerator.is_available", return_value=True),
        mock.patch("torch.mps.synchronize", waited),
        mock.patch("torch.mps.driver_allocated_memory", return_value=3 * 10**9),
    ):
        yield waited


class Watch(Callback):
    """Keeps the device and the values of the first batch of each epoch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            self.seen.append((batch.images.device.type, float(outputs["loss"])))


def fitted(folder, accelerator, loss, **options):
    """Trains two epochs on digits; returns what was logged, the losses, the devices and the weights."""
    torch.manual_seed(0)
    teacher, student = create_model("resnet8", 10), create_model("resnet8", 10)
    student.to(memory_format=torch.channels_last)  # whose gradient would be wrong on an Apple GPU
    frozen = FrozenTeacher(teacher, channels_last=True)
    data = DigitsDataModule(batch_size=128, subset=0.3, strong_view=loss.needs_strong_view, val_fraction=0.1, **options)
    if not (loss.needs_strong_view or options):
        frozen.use_table(LogitsTable(folder / f"{accelerator}.logits", 1437 * 2 * 81, 10, "float32"))
    module = DistillationModule(student, loss, partial(torch.optim.SGD, lr=0.02), teacher=frozen, num_classes=10)
    watch = Watch()
    callbacks = (watch, StepSeed(0), Throughput(2), TeacherMonitor(), GradientNorm(), Divergence(folder, every=2))
    saves = (WeightAverage(decay=0.9), LastCheckpoint(folder / accelerator, minutes=None))
    trainer = quiet_trainer(*callbacks, *saves, accelerator=accelerator, max_epochs=2, default_root_dir=folder)
    trainer.fit(module, datamodule=data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if "images" not in name}
    return logged, watch.seen, {name: value.cpu() for name, value in module.student.state_dict().items()}


@pytest.mark.parametrize(
    ("loss", "options"),
    [(RLDLoss(), {}), (RLDLoss(), {"mixup": 0.2, "cutmix": 1.0}), (MLKDLoss(), {})],
    ids=["cached logits", "mixed images", "strong views"],
)
def test_a_run_is_that_of_a_cpu(apple_gpu, tmp_path, loss, options):
    expected, losses, weights = fitted(tmp_path, "cpu", loss, **options)
    with pretended_apple_gpu():
        logged, own_losses, own_weights = fitted(tmp_path, "mps", loss, **options)
    assert {device for device, _ in own_losses} == {"mps"}
    assert apple_gpu.called
    assert [loss for _, loss in own_losses] == pytest.approx([loss for _, loss in losses], rel=1e-3)
    assert logged == pytest.approx(expected, rel=1e-2, abs=1e-3)
    torch.testing.assert_close(own_weights, weights, rtol=1e-3, atol=1e-3)
    assert not any(isinstance(value, AppleTensor) for value in own_weights.values())
    saved = [torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("cpu", "mps")]
    torch.testing.assert_close(saved[1], saved[0], rtol=1e-3, atol=1e-3)


def test_what_is_asked_of_the_device(apple_gpu):
    device = torch.device("mps")
    assert _peak_memory(device) == 3
    assert fast_precision("auto") == fast_precision("mps") == "32-true"
    clock(device)
    apple_gpu.assert_called_once_with()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer=ddp"],
            "strategy=ddp trainer.devices=auto needs several GPUs, and a Mac has one; choose .*ddp_cpu",
        ),
        (["trainer.devices=2"], "trainer.strategy=auto trainer.devices=2 needs several GPUs"),
        (["trainer.precision=64-true"], "trainer.precision=64-true needs float64, .* add trainer=cpu"),
        (["model.teacher.dtype=float64"], "model.teacher.dtype=float64 needs float64"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(apple_gpu, monkeypatch, overrides, message):
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_machine(compose("data=digits", "trainer=ddp_cpu"))
    check_machine(compose("data=digits"))
    with pytest.raises(UserError, match=message):
        check_machine(compose("data=digits", *overrides))


def test_macos_is_asked_for_the_chip(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    asked = mock.Mock(return_value=mock.Mock(stdout="Apple M2 Pro\n"))
    monkeypatch.setattr(rld_lightning.runs.provenance.subprocess, "run", asked)
    assert rld_lightning.runs.provenance.processor_name() == "Apple M2 Pro"
