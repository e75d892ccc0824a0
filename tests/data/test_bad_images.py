"""Unreadable files: replaced in training, skipped in evaluation, and reported once."""

import logging
import os
import re
import shutil

import numpy as np
import pytest
import torch
from helpers.data import epoch_of, merge, part, ready, same, write_jpegs
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn

from rld_lightning.data import ImageFolderDataModule
from rld_lightning.data.bad_images import MOST_LOGGED, BadImage, BadImageReport
from rld_lightning.errors import UserError
from rld_lightning.losses import CELoss
from rld_lightning.module import DistillationModule

DEEP = np.full((20, 20), 0.5, dtype=np.float32)
# The defect of each bad training image: index, class and number. There are three classes of six.
BAD = {0: ("a", 0, "empty"), 5: ("a", 5, "32 bit"), 7: ("b", 1, "truncated"), 8: ("b", 2, "text")}
REPLACED_BY = {0: 1, 5: 1, 7: 9, 8: 9}


def spoil(path, how):
    if how == "32 bit":
        Image.fromarray(DEEP).save(path.with_suffix(".tif"))
        path.unlink()
    else:
        content = {"empty": b"", "truncated": path.read_bytes()[:-40], "text": b"not an image"}[how]
        path.write_bytes(content)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    write_jpegs(root, {"train": 6, "val": 4}, size=(30, 40), ending=".jpg")
    return root


@pytest.fixture
def root(good, tmp_path):
    """The same images, with four of 18 training and three of 12 test images made unreadable."""
    shutil.copytree(good, tmp_path / "bad")
    for name, number, how in BAD.values():
        spoil(tmp_path / "bad" / "train" / name / f"{number}.jpg", how)
    for name, number, how in (("a", 1, "truncated"), ("a", 2, "empty"), ("c", 3, "text")):
        spoil(tmp_path / "bad" / "val" / name / f"{number}.jpg", how)
    return tmp_path / "bad"


def folder_data(root, rank=0, world_size=1, **options):
    options = {"image_size": 16, "batch_size": 4, "eval_batch_size": 4, "num_workers": 0} | options
    return ready(ImageFolderDataModule(root, **options), rank, world_size)


def logged(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("rld_lightning")]


def test_a_bad_image_is_replaced_by_one_of_the_same_class(good, root):
    expected = merge(epoch_of(folder_data(good, strong_view=True).train_dataloader(), 2))
    data = folder_data(root, strong_view=True)
    actual = merge(epoch_of(data.train_dataloader(), 2))
    assert torch.equal(actual.label, expected.label)
    assert torch.equal(actual.label, data.train_label[actual.index])
    assert actual.index.tolist() == [REPLACED_BY.get(index, index) for index in expected.index.tolist()]
    readable = torch.tensor([index not in BAD for index in expected.index.tolist()])
    assert torch.equal(actual.images[readable], expected.images[readable])
    assert torch.equal(actual.strong[readable], expected.strong[readable])


def test_the_replacement_depends_only_on_the_images(root):
    alone = epoch_of(folder_data(root).train_dataloader(), 1)
    assert same(epoch_of(folder_data(root, num_workers=2).train_dataloader(), 1), alone)
    ranks = [epoch_of(folder_data(root, rank, 2).train_dataloader(), 1) for rank in range(2)]
    together = [merge(step) for step in zip(*ranks, strict=True)]
    assert same(together[:-1], alone[:-1])  # each process would get one of the last two images; it gets two
    loader = folder_data(root).train_dataloader()
    loader.load_state_dict({"epoch": 1, "batch": 2})
    assert same(epoch_of(loader, 1), alone[2:])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("eval_batch_size", [1, 4])
def test_evaluation_counts_each_readable_image_once(good, root, world_size, eval_batch_size):
    expected = merge(folder_data(good).test_dataloader())
    ranks = [
        list(folder_data(root, rank, world_size, eval_batch_size=eval_batch_size).test_dataloader())
        for rank in range(world_size)
    ]
    # In the same number of steps on every process, because processes wait for each other in them.
    assert len({len(batches) for batches in ranks}) == 1
    found = merge([batch for batches in ranks for batch in batches])
    assert sorted(found.index.tolist()) == [0, 3, 4, 5, 6, 7, 8, 9, 10]
    for position, index in enumerate(found.index.tolist()):
        assert same([part(found, position, position + 1)], [part(expected, index, index + 1)])


def test_an_evaluation_batch_may_be_empty(root):
    class Probe(DistillationModule):
        def validation_step(self, batch, batch_idx):
            self.sizes.append(len(batch.label))
            return super().validation_step(batch, batch_idx)

    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    module = Probe(network, CELoss(), lambda parameters: torch.optim.SGD(parameters, 0.1), num_classes=3)
    module.sizes = []
    data = folder_data(root, eval_batch_size=1)
    runner = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (values,) = runner.validate(module, data, verbose=False)
    assert module.sizes == [1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    batch = merge(data.test_dataloader())
    with torch.no_grad():
        logits = network.eval()(batch.images)
    assert values["val/ce"] == pytest.approx(nn.functional.cross_entropy(logits, batch.label).item(), rel=1e-5)
    assert values["val/top1"] == pytest.approx(100 * (logits.argmax(1) == batch.label).float().mean().item(), rel=1e-5)


def test_each_bad_image_is_reported_once(root, tmp_path, caplog):
    listing = tmp_path / "run" / "bad_images.txt"
    data = folder_data(root, num_workers=2, bad_images_file=listing)
    loader = data.train_dataloader()
    for epoch in range(2):
        epoch_of(loader, epoch)
    list(data.test_dataloader())
    # Another process of the run, and another run in the same folder.
    epoch_of(folder_data(root, 1, 2, bad_images_file=listing).train_dataloader())
    entries = dict(line.split("\t") for line in listing.read_text().splitlines())
    names = {"a/0.jpg", "a/5.tif", "b/1.jpg", "b/2.jpg"}
    assert set(entries) == {f"{root}/train/{name}" for name in names} | {
        f"{root}/val/{name}" for name in ("a/1.jpg", "a/2.jpg", "c/3.jpg")
    }
    assert entries[f"{root}/train/a/0.jpg"] == "the file is empty"
    assert entries[f"{root}/train/a/5.tif"] == "mode F has more than 16 bits a channel"
    assert [path.name for path in listing.parent.iterdir()] == [listing.name]  # and no lock
    messages = logged(caplog)
    assert len(messages) == len(entries) == 7
    for path, reason in entries.items():
        (message,) = [message for message in messages if message.startswith(path)]
        consequence = "left out of the evaluation" if "/val/" in path else "another image of its class takes its place"
        assert f"cannot be read as an image ({reason}): " in message
        assert consequence in message


def test_without_a_file_each_process_reports_once(root, caplog):
    loader = folder_data(root).train_dataloader()
    for epoch in range(2):
        epoch_of(loader, epoch)
    assert len(logged(caplog)) == len(BAD)


def test_many_bad_images_are_listed_rather_than_logged(tmp_path, caplog):
    report = BadImageReport(tmp_path / "bad.txt")
    images = [BadImage(f"{number}.jpg", "of no\nuse") for number in range(MOST_LOGGED + 30)]
    for first in range(0, len(images), 7):
        report.add(images[: first + 7], "so what.")
    assert (tmp_path / "bad.txt").read_text().splitlines() == [f"{image.path}\tof no use" for image in images]
    messages = logged(caplog)
    assert len(messages) == MOST_LOGGED + 1
    assert messages[-1] == f"More than {MOST_LOGGED} images cannot be read: see {tmp_path / 'bad.txt'}"


def test_nothing_is_written_without_bad_images(good, tmp_path, caplog):
    data = folder_data(good, bad_images_file=tmp_path / "run" / "bad.txt")
    list(data.train_dataloader())
    assert not (tmp_path / "run").exists()
    assert not logged(caplog)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_images_can_be_errors(root, split, num_workers):
    data = folder_data(root, bad_images="error", num_workers=num_workers, shuffle=False)
    loader = data.train_dataloader() if split == "train" else data.test_dataloader()
    message = r"^\S+\.jpg cannot be read as an image \(.*\): replace or delete it, or set data\.bad_images=replace"
    with pytest.raises(ValueError, match=message):
        list(loader)


def test_a_class_without_a_readable_image_is_an_error(root, caplog):
    caplog.set_level(logging.CRITICAL)
    for path in (root / "train" / "b").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="nor can the images of its class that would take its place: check the folder"):
        epoch_of(folder_data(root).train_dataloader())


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_readable_images_ends_the_run_in_one_sentence(root, split, world_size, num_workers):
    for path in (root / {"train": "train", "test": "val"}[split]).rglob("*.*"):
        path.write_bytes(b"")
    for rank in range(world_size):
        data = folder_data(root, rank, world_size, num_workers=num_workers)
        loader = data.train_dataloader() if split == "train" else data.test_dataloader()
        with pytest.raises(UserError) as caught:
            next(iter(loader))
        if split == "test":
            assert re.fullmatch(
                rf"none of the 12 images of the split can be read, such as {root}/val/\S+\.jpg \(the file is empty\): "
                r"check the folder and its disk, or convert the images\.",
                str(caught.value),
            )


def test_one_readable_image_is_enough_for_an_evaluation(root):
    for path in (root / "val").rglob("*.*"):
        if path.name != "0.jpg" or path.parent.name != "c":
            path.write_bytes(b"")
    for rank in range(4):
        assert len(merge(folder_data(root, rank, 4).test_dataloader()).label) == (rank == 8 % 4)


def test_pipes_devices_and_oversized_images_are_bad_images(good, root, caplog):
    """A pipe without a writer, a device, and a small file that claims too many pixels."""
    folder = root / "train" / "c"
    for number in (0, 2, 4):
        (folder / f"{number}.jpg").unlink()
    os.mkfifo(folder / "0.jpg")
    (folder / "2.jpg").symlink_to("/dev/zero")
    content = (folder / "1.jpg").read_bytes()
    (folder / "4.jpg").write_bytes(content.replace(bytes((0, 40, 0, 30)), b"\xff\xf0" * 2))
    batch = merge(epoch_of(folder_data(root).train_dataloader()))
    assert sorted(batch.index.tolist()) == sorted(
        REPLACED_BY.get(index, {12: 13, 14: 15, 16: 17}.get(index, index)) for index in range(18)
    )
    reasons = {message.split("cannot be read as an image")[1].split(":")[0] for message in logged(caplog)}
    assert {
        " (it is not a regular file)",
        " (its 65,520 x 65,520 pixels are more than the limit of 128,000,000)",
    } <= reasons
    assert len(logged(caplog)) == len(BAD) + 3
