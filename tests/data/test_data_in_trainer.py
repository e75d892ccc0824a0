"""The loaders in Lightning's loops: epochs are set, runs resume, batches are divided, samplers are not replaced."""

import gc
import multiprocessing
import os

import pytest
import torch
from helpers.data import same
from helpers.shards import pack_folder, shards_data, write_images
from helpers.training import quiet_trainer
from lightning.pytorch import LightningModule
from PIL import Image
from torch import nn

from rld_lightning.data import Batch, DigitsDataModule, ImageFolderDataModule
from rld_lightning.data.base import as_batch


class Recorder(LightningModule):
    """A linear classifier that records the samples of its steps."""

    def __init__(self, save_at=None):
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
        self.model(torch.zeros(1, 3, 8, 8))
        self.save_at = save_at
        self.trained, self.announced, self.evaluated = [], [], []

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.announced.append(self.trainer.train_dataloader.sampler.epoch)
        self.trained.append(batch)
        return nn.functional.cross_entropy(self.model(batch.images), batch.label)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.save_at and self.save_at[0] == self.trainer.global_step:
            self.trainer.save_checkpoint(self.save_at[1])

    def validation_step(self, batch, batch_idx):
        self.evaluated.append(batch.index)

    def test_step(self, batch, batch_idx):
        self.evaluated.append(batch.index)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(epochs=2, **options):
    return quiet_trainer(max_epochs=epochs, devices=1, **{"num_sanity_val_steps": 2} | options)


def digits(**options):
    return DigitsDataModule(**{"batch_size": 500} | options)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 5), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (12, 10), (number * 40, 9, 9)).save(tmp_path / split / name / f"{number}.png")
    return ImageFolderDataModule(tmp_path, image_size=8, batch_size=4, num_workers=2)


@pytest.fixture(params=["memory", "stream"])
def data(request):
    return digits() if request.param == "memory" else request.getfixturevalue("folder")


def test_epochs_are_announced_and_differ(data):
    model = Recorder()
    trainer().fit(model, data)
    assert model.announced == [0, 1]
    assert len(model.trained) == 6
    assert not same(model.trained[:3], model.trained[3:])
    for epoch in (model.trained[:3], model.trained[3:]):
        assert sorted(torch.cat([batch.index for batch in epoch]).tolist()) == list(range(data.train_size))


class Failing(Recorder):
    """Fails at its first step, while more batches are being loaded."""

    def training_step(self, batch, batch_idx):
        raise KeyError("step")


class Garbage:
    """Part of a reference cycle, which must not be finalised in another process."""

    def __init__(self, path):
        self.path, self.home, self.me = path, os.getpid(), self

    def __del__(self):
        self.path.write_text("ended at home" if os.getpid() == self.home else "ended elsewhere")


class Collecting:
    """The files of a split; reading one collects garbage first."""

    def __init__(self, images):
        self.images = images

    def __getattr__(self, name):
        return getattr(self.images, name)

    def read(self, index):
        gc.collect()
        return self.images.read(index)


@pytest.mark.parametrize("fails", [True, False])
def test_no_worker_outlives_a_training(folder, fails):
    before = multiprocessing.active_children()  # of loaders of other tests, not yet garbage-collected
    runner = trainer(max_steps=1, limit_val_batches=0)  # of three steps
    if fails:
        with pytest.raises(KeyError):
            runner.fit(Failing(), folder)
    else:
        runner.fit(Recorder(), folder)
        trainer(1).fit(again := Recorder(), folder)
        assert len(again.trained) == 3
    loaders = list(folder._loaders)
    assert loaders  # the trainer still holds them
    assert all(loader._workers._iterator is None for loader in loaders)
    assert set(multiprocessing.active_children()) <= set(before)


def test_a_worker_does_not_finalise_its_parent_s_objects(folder, tmp_path):
    folder.prepare_data()
    folder.setup()
    loader = folder.train_dataloader()
    loader.dataset.images = Collecting(loader.dataset.images)
    gc.disable()  # the cycle must exist when workers are forked
    try:
        Garbage(tmp_path / "end.txt")
        assert len(list(loader)) == 3
    finally:
        gc.enable()
    assert not (tmp_path / "end.txt").exists()
    gc.collect()
    assert (tmp_path / "end.txt").read_text() == "ended at home"


@pytest.fixture(params=["memory", "folder", "shards"])
def noise(request, tmp_path):
    """A data set of each kind, with noise images, of which every crop is different."""
    if request.param == "memory":
        return digits()
    write_images(tmp_path / "images")
    if request.param == "shards":
        pack_folder(tmp_path / "images", tmp_path / "shards")
        return shards_data(tmp_path / "shards", batch_size=15, image_size=8, resize=8)
    return ImageFolderDataModule(tmp_path / "images", image_size=8, batch_size=15, num_workers=0)


def test_overfitting_uses_the_same_images_in_each_epoch_with_new_augmentation(noise):
    model = Recorder()
    trainer(overfit_batches=1).fit(model, noise)
    first, second = model.trained
    assert torch.equal(first.index, second.index)
    assert len(first.label.unique()) > 2  # without shuffling there would be the first class only
    assert not torch.equal(first.images, second.images)
    assert len(model.evaluated[-1]) < noise.val_size or len(noise.val_dataloader()) == 1


def test_the_schedule_counts_limited_training_batches(noise):
    model, runner = Recorder(), trainer(limit_train_batches=0.7, limit_val_batches=0)
    runner.fit(model, noise)
    assert runner.estimated_stepping_batches == len(model.trained) == 2 * int(0.7 * len(noise.train_dataloader()))
    assert not torch.equal(model.trained[0].index, model.trained[len(model.trained) // 2].index)


def test_every_test_image_is_evaluated_once(data):
    model = Recorder()
    runner = trainer(limit_train_batches=1, num_sanity_val_steps=0)
    runner.fit(model, data)
    model.evaluated.clear()
    runner.test(model, data, verbose=False)
    assert torch.equal(torch.cat(model.evaluated), torch.arange(data.test_size))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("step", [2, 3, 4], ids=["mid-epoch", "end of epoch", "mid second epoch"])
def test_a_resumed_run_sees_the_same_batches(data, step, tmp_path):
    data.strong_view = True
    checkpoint = tmp_path / "run.ckpt"
    whole = Recorder(save_at=(step, checkpoint))
    trainer(3).fit(whole, data)

    resumed = Recorder()
    trainer(3).fit(resumed, data, ckpt_path=checkpoint)
    assert same(resumed.trained, whole.trained[step:])
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_checkpoint_of_a_finished_epoch_continues_with_the_next(data, tmp_path):
    first = trainer(1)
    first.fit(Recorder(), data)
    first.save_checkpoint(tmp_path / "run.ckpt")
    whole, resumed = Recorder(), Recorder()
    trainer(2).fit(whole, data)
    trainer(2).fit(resumed, data, ckpt_path=tmp_path / "run.ckpt")
    assert resumed.announced == [1]
    assert same(resumed.trained, whole.trained[3:])


def test_validation_does_not_change_training():
    with_validation, without = Recorder(), Recorder()
    trainer().fit(with_validation, digits(val_fraction=0.2))
    trainer(limit_val_batches=0).fit(without, digits(val_fraction=0.2))
    assert same(with_validation.trained, without.trained)


def test_rank_and_device_are_the_trainers():
    data = digits()
    data.trainer = trainer()
    assert (data.rank, data.world_size, data.device) == (0, 1, torch.device("cpu"))


def test_batches_of_other_loaders_are_converted():
    images, label, index = torch.zeros(2, 3, 4, 4), torch.arange(2), torch.arange(2) + 5
    own = Batch(images, label, index)
    assert as_batch(own) is own
    x, y = own[:2]
    assert x is images
    assert y is label
    assert as_batch([images, label]) == Batch(images, label, None)
    assert as_batch((images, label, index)).index is index
    for wrong in ({"x": images}, [images], [images, [0, 1]], images):
        with pytest.raises(ValueError, match=r"must be \(images, label\), \(images, label, index\) or a"):
            as_batch(wrong)
