"""The trainer's callbacks that are called in a step, and the values that are logged."""

from types import SimpleNamespace

import torch
from helpers.training import job, quiet_trainer
from lightning.pytorch import Callback, Trainer

from rld_lightning import CELoss, DistillationModule, create_model
from rld_lightning.data import DigitsDataModule
from rld_lightning.trainer_callbacks import callbacks_of, log_in_place, skip_idle_hooks, skip_idle_profiler


class Counts(Callback):
    """Implements one of a step's hooks."""

    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, *_):
        self.batches += 1


def test_only_implemented_hooks_are_called_in_a_step():
    counts, given, idle = Counts(), Counts(), Callback()
    given.on_before_zero_grad = lambda *_: setattr(given, "zeroed", True)
    trainer = SimpleNamespace(callbacks=[counts, given, idle])
    skip_idle_hooks(trainer)
    assert [counts.on_train_batch_start, counts.on_before_zero_grad, idle.on_train_batch_end] == [None] * 3
    assert callable(counts.on_train_batch_end)
    assert callable(given.on_before_zero_grad)
    assert callable(idle.on_fit_start), "hooks outside of a step stay"
    skip_idle_hooks(trainer)  # again, as when a trainer is used twice
    assert callbacks_of(trainer, Counts) == [counts, given]


def test_lightning_skips_idle_hooks(tmp_path):
    counts = Counts()
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "max_steps": 3}
    trainer = Trainer(accelerator="cpu", callbacks=[counts, Callback()], default_root_dir=tmp_path, **options)
    skip_idle_hooks(trainer)
    job = DistillationModule(create_model("resnet8", 10), CELoss(), torch.optim.SGD, num_classes=10)
    trainer.fit(job, DigitsDataModule(batch_size=32))
    assert counts.batches == 3


def test_only_a_profiler_that_measures_nothing_is_replaced(tmp_path):
    idle, measured = (quiet_trainer(max_steps=1, profiler=profiler) for profiler in (None, "simple"))
    for trainer in (idle, measured):
        skip_idle_profiler(trainer)
        trainer.fit(job(), DigitsDataModule())
    assert idle.profiler.profile("a") is idle.profiler.profile("b")
    assert "run_training_batch" in measured.profiler.summary()


def test_values_logged_in_place_are_those_that_lightning_logs(tmp_path):
    class Logs(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.log("mean", float(batch_idx), on_step=True, on_epoch=True, batch_size=len(batch.label))
            pl_module.log("largest", torch.tensor(float(batch_idx)), reduce_fx=torch.max)

        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.log("later", trainer.current_epoch)

        def on_train_epoch_start(self, trainer, pl_module):
            self.seen.append(dict(trainer.callback_metrics))

    def fit(prepare):
        torch.manual_seed(0)
        logs = Logs()
        trainer = quiet_trainer(logs, max_epochs=3, limit_train_batches=3, default_root_dir=tmp_path)
        prepare(trainer)
        trainer.fit(job(), DigitsDataModule(batch_size=32))
        return [*logs.seen, dict(trainer.callback_metrics)], trainer.fit_loop.epoch_loop

    usual, _ = fit(lambda trainer: None)
    found, loop = fit(log_in_place)
    assert found == usual
    assert [values.get("largest") for values in found] == [None, 2.0, 2.0, 2.0]
    assert {"val/top1", "train/loss", "mean_epoch", "later"} <= found[-1].keys()
    # What a resumed run logs on another device is moved there.
    (value,) = (value for name, value in loop._results.items() if name.endswith(".later"))
    assert value.to(torch.device("cpu")) is value
    assert value.to(torch.device("meta")).value.device.type == "meta"


def test_a_batch_on_the_device_is_not_moved():
    data = DigitsDataModule(batch_size=32)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert data.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch
    elsewhere = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert {elsewhere.images.device.type, elsewhere.label.device.type} == {"meta"}
    assert batch.images.device.type == "cpu"
