"""The size of a run's files is known before training."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, AdamW

from rld_lightning import CELoss, DistillationModule
from rld_lightning.callbacks import CheckpointFiles, WeightAverage
from rld_lightning.data import DigitsDataModule
from rld_lightning.errors import UserError, disk_errors, user_errors
from rld_lightning.models.factory import create_model
from rld_lightning.models.weights.save import save_weights
from rld_lightning.tasks.run import disk_space as room
from rld_lightning.tasks.run.disk_space import bytes_needed, check_disk_space


def build(folder, make_optimizer, *more):
    module = DistillationModule(create_model("resnet20", 10), CELoss(), make_optimizer, num_classes=10)
    plain = {"enable_version_counter": False}
    callbacks = [
        ModelCheckpoint(folder, filename="best", monitor="val/top1", mode="max", save_weights_only=True, **plain),
        ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True, **plain),
    ]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "logger": False}
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", limit_train_batches=1, limit_val_batches=1, callbacks=[*callbacks, *more],
        plugins=[CheckpointFiles()], **quiet,
    )  # fmt: skip
    return trainer, module


@pytest.mark.parametrize(
    ("make_optimizer", "more"),
    [
        (lambda p: SGD(p, lr=0.1, momentum=0.9), ()),
        (lambda p: AdamW(p, lr=0.1), ()),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), (WeightAverage(decay=0.9),)),
    ],
)
def test_estimate_equals_what_is_written(tmp_path, make_optimizer, more):
    trainer, module = build(tmp_path, make_optimizer, *more)
    estimate = bytes_needed(tmp_path, trainer, module)
    trainer.fit(module, DigitsDataModule(batch_size=8))
    save_weights(module.student, tmp_path / "student.safetensors")
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 4
    assert estimate == pytest.approx(sum(sizes) + max(sizes) + room._OTHERS, rel=0.05)
    again = bytes_needed(tmp_path, trainer, module)
    assert again == pytest.approx(max(sizes) + room._OTHERS, rel=0.1), "what is there is replaced"


def test_run_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    trainer, module = build(tmp_path, SGD)
    module.make_optimizer = lambda p: SGD(p, lr=0.1)
    check_disk_space(tmp_path, trainer, module)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    with pytest.raises(ValueError, match=r"has 3 MB free, and the checkpoints .* take [6-9] MB: make room, or choose"):
        check_disk_space(tmp_path / "new", trainer, module)


def test_full_disk_is_no_traceback():
    words = r"metrics\.csv cannot be written \(No space left on device\): make room"
    with pytest.raises(UserError, match=words), disk_errors():
        raise OSError(28, os.strerror(28), "/x/metrics.csv")
    with pytest.raises(UserError, match=words), user_errors():  # as of what is prepared
        raise OSError(28, os.strerror(28), "/x/metrics.csv")
    with pytest.raises(FileNotFoundError), disk_errors():
        Path("/not/there").read_text()


def test_path_that_cannot_be_used_is_no_errno():
    words = r"^/not/there cannot be read or written \(No such file or directory\): check the path and the access"
    with pytest.raises(UserError, match=words), user_errors():
        Path("/not/there").read_text()
    with pytest.raises(UserError, match=r"^/x is missing: make it.$"), user_errors():
        raise FileNotFoundError("/x is missing: make it.")
