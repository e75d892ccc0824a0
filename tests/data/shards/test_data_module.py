"""Shards give the folder's images, in an order that does not depend on the number of processes or workers."""

import logging
import shutil

import numpy as np
import pytest
import torch
from helpers.data import epoch_of, merge, same
from helpers.shards import LOOK, folder_data, pack_folder, serve, shards_data, write_images
from PIL import Image

from rld_lightning.data.sampler import epoch_generator
from rld_lightning.data.shards.order import SHARDS_AHEAD, ShardShuffle

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    """45 training images and 18 test images, about four per shard."""
    root = tmp_path_factory.mktemp("100% shards")
    pack_folder(folder, root)
    return root


def train_epoch(root, epoch=0, **options):
    return epoch_of(shards_data(root, **options).train_dataloader(), epoch)


def logged(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("rld_lightning")]


def test_the_data_set_is_the_one_that_was_packed(folder, shards):
    data, packed = shards_data(shards), folder_data(folder)
    assert data.describe() == packed.describe()
    for fact in ("name", "num_classes", "class_names", "image_shape", "mean", "std", "resize"):
        assert getattr(data, fact) == getattr(packed, fact)
    assert len(data.index.shards["train"]) > 8
    assert [sum(shard.images for shard in shards) for shards in data.index.shards.values()] == [45, 18]
    other = shards_data(shards, image_size=32, mean=(0, 0, 0), name="mine")
    assert (other.image_shape, other.resize, other.mean, other.name) == ((3, 32, 32), 37, (0, 0, 0), "mine")


def test_evaluation_is_that_of_the_folder(folder, shards):
    assert same(list(shards_data(shards).test_dataloader()), list(folder_data(folder).test_dataloader()))


def test_the_exif_orientation_is_applied_in_shards_and_from_the_cache(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "turned")
    exif = Image.Exif()
    for number, path in enumerate(sorted((tmp_path / "turned").rglob("*.JPEG"))):
        exif[0x0112] = 1 + number % 8
        Image.open(path).save(path, exif=exif)
    pack_folder(tmp_path / "turned", tmp_path / "shards")
    expected = list(folder_data(tmp_path / "turned", decode="pil").test_dataloader())
    assert not same(expected, list(folder_data(folder).test_dataloader()))
    assert same(list(shards_data(tmp_path / "shards").test_dataloader()), expected)
    with serve(tmp_path / "shards") as (address, _):
        assert same(list(shards_data(address, cache=tmp_path / "cache").test_dataloader()), expected)


def test_training_images_are_packed_in_random_order(folder, shards):
    plain = {"shuffle": False, "augment": False, "strong_view": True}
    expected = merge(folder_data(folder, **plain).train_dataloader())
    data = shards_data(shards, **plain)
    actual = merge(data.train_dataloader())
    order = torch.randperm(45, generator=torch.Generator().manual_seed(0))
    assert torch.equal(actual.images, expected.images[order])
    assert torch.equal(actual.label, expected.label[order])
    assert torch.equal(actual.label, data.train_label)


def test_each_epoch_has_every_image_once_in_another_order(shards):
    first, second = merge(train_epoch(shards, 0)), merge(train_epoch(shards, 1))
    for epoch in (first, second):
        assert sorted(epoch.index[:42].tolist() + epoch.index[42:45].tolist()) == list(range(45))
    assert not torch.equal(first.index, second.index)
    assert same(train_epoch(shards, 1), train_epoch(shards, 1))
    assert not same(train_epoch(shards, 1), train_epoch(shards, 1, seed=1))
    assert not torch.equal(merge(train_epoch(shards, 1, mixed_shards=None)).index, second.index)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("place", ["file", "http"])
def test_batches_do_not_depend_on_workers_or_place(shards, place, tmp_path):
    expected = [train_epoch(shards, epoch, strong_view=True) for epoch in (0, 1)]
    tests = list(shards_data(shards).test_dataloader())
    with serve(shards) as (address, _):
        root = shards.as_uri() if place == "file" else address
        data = shards_data(root, num_workers=2, cache=tmp_path, strong_view=True)
        loader = data.train_dataloader()
        assert same(epoch_of(loader, 0), expected[0])
        if place == "file":
            assert same(epoch_of(loader, 1), expected[1])
        assert same(list(data.test_dataloader()), tests)


def test_held_out_images_and_subsets_are_stratified(shards):
    data = shards_data(shards, val_fraction=0.2, subset=0.5, seed=3)
    assert (data.train_size, data.val_size, data.test_size) == (18, 9, 18)
    assert torch.bincount(data.train_label).tolist() == [6, 6, 6]
    assert torch.bincount(data.splits["val"].labels).tolist() == [3, 3, 3]
    assert not set(data.splits["train"].samples.member) & set(data.splits["val"].samples.member)
    batch = merge(data.train_dataloader())
    assert sorted(batch.index.tolist()) == list(range(18))
    assert torch.equal(batch.label, data.train_label[batch.index])


def test_a_separate_validation_split_is_packed_too(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    shutil.copytree(folder / "val", tmp_path / "images" / "test")
    pack_folder(tmp_path / "images", tmp_path / "shards")
    data = shards_data(tmp_path / "shards")
    assert data.describe().endswith("validated on the 18 images of the data set's own validation split")
    assert same(list(data.val_dataloader()), list(data.test_dataloader()))


def spoil(root, split, *positions):
    """Overwrites images in their shards and returns their names."""
    images = shards_data(root).splits[split]
    for position in positions:
        with (root / images.path(position).split("/")[-2]).open("r+b") as file:
            file.seek(images.samples.offset[position])
            file.write(bytes(int(images.samples.size[position])))
    return {images.path(position) for position in positions}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_replaced_and_reported_once_with_shard_and_member(shards, tmp_path, caplog, num_workers):
    root = shutil.copytree(shards, tmp_path / "shards")
    bad = spoil(root, "train", 7, 20) | spoil(root, "test", 4)
    data = shards_data(root, num_workers=num_workers, bad_images_file=tmp_path / "bad.txt")
    loader = data.train_dataloader()
    for epoch in (0, 1):
        actual, expected = merge(epoch_of(loader, epoch)), merge(train_epoch(shards, epoch))
        assert torch.equal(actual.label, expected.label)
        assert not {7, 20} & set(actual.index.tolist())
        fine = torch.tensor([index not in (7, 20) for index in expected.index.tolist()])
        assert torch.equal(actual.images[fine], expected.images[fine])
    assert sorted(merge(data.test_dataloader()).index.tolist()) == [*range(4), *range(5, 18)]
    assert {line.split("\t")[0] for line in (tmp_path / "bad.txt").read_text().splitlines()} == bad
    messages = logged(caplog)
    assert len(messages) == 3
    assert all(any(message.startswith(f"{path} cannot be read as an image") for message in messages) for path in bad)
    assert f"{root}/train-0000" in messages[0]
    assert "_a_b.jpeg cannot" in messages[0]


def test_bad_images_can_be_errors(shards, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    root = shutil.copytree(shards, tmp_path / "shards")
    (bad,) = spoil(root, "train", 3)
    with pytest.raises(ValueError, match=f"{bad} cannot be read as an image .* data.bad_images=replace"):
        list(shards_data(root, bad_images="error").train_dataloader())


class TestOrder:
    """On 64 shards of 40 to 60 images."""

    shard = np.repeat(np.arange(64), np.random.default_rng(0).integers(40, 61, size=64))
    size, batch = len(shard), 64

    def order(self, seed=0, streams=4, mixed=8, batch=64):
        return ShardShuffle(self.shard, batch, streams, mixed)(self.size, epoch_generator(seed, 0))

    @pytest.mark.parametrize(("streams", "batch"), [(1, 64), (3, 64), (8, 64), (8, 6), (4, 10_000)])
    def test_is_a_permutation(self, streams, batch):
        order = self.order(streams=streams, batch=batch)
        assert torch.equal(order.sort().values, torch.arange(self.size))
        assert not torch.equal(order, self.order(1, streams=streams, batch=batch))

    def test_only_a_window_of_shards_is_in_use_at_a_time(self):
        batches = self.size // self.batch
        drawn = self.shard[self.order()[: batches * self.batch].numpy()].reshape(batches, self.batch)
        for stream in range(4):
            row = drawn[:, 16 * stream : 16 * (stream + 1)].ravel()
            lives = [np.flatnonzero(row == shard)[[0, -1]] for shard in np.unique(row)]
            in_use = [sum(first <= at <= last for first, last in lives) for at in range(len(row))]
            assert max(in_use) <= 4  # two for the window, and one at each end
        mixed = [len(np.unique(batch)) for batch in drawn]
        assert np.mean(mixed[10:-10]) > 8

    def test_images_of_a_shard_are_spread(self):
        order = self.order().numpy()
        order = order[: self.size // self.batch * self.batch].reshape(-1, 4, 16)  # batches, streams, positions
        neighbours = self.shard[order[..., 1:]] == self.shard[order[..., :-1]]
        assert 0.2 < neighbours[10:-10].mean() < 0.5  # of three shards in use; 0.98 in the order of the shards
        assert (np.diff(order) == 1).mean() < 0.05

    @pytest.mark.parametrize("world_size", [2, 4])
    def test_hardly_a_shard_is_read_by_two_ranks(self, world_size):
        batches = self.size // self.batch
        drawn = self.shard[self.order()[: batches * self.batch].numpy()].reshape(batches, world_size, -1)
        read = [len(np.unique(drawn[:, rank])) for rank in range(world_size)]
        assert sum(read) <= 64 + world_size - 1


def test_shards_are_requested_once_and_ahead_of_their_images(shards):
    for rank, world_size in ((0, 1), (1, 3)):
        loader = shards_data(shards, rank, world_size, streams=1, mixed_shards=1).train_dataloader()
        images, announced = loader.dataset.images, []
        loader._keys.start = 2
        for step, request in enumerate(loader._keys):
            announced += request.ahead
            needed = {int(images.shard[index]) for index, _ in request.keys}
            assert needed <= set(announced)
            assert step or len(announced) <= len(needed) + SHARDS_AHEAD
        assert len(announced) == len(set(announced))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": 0}, "data.mixed_shards=32 and data.streams=0 do not fit"),
        ({"mixed_shards": 4}, "data.mixed_shards=4 and data.streams=8 do not fit: at least one stream"),
        ({"cache_gb": -1}, "cache_gb=-1 must be 0 or more"),
        ({"resize": LOOK["image_size"] - 1}, "data.image_size=16 and data.resize=15 do not fit"),
    ],
)
def test_options_out_of_range_are_refused(shards, options, message):
    with pytest.raises(ValueError, match=message):
        shards_data(shards, **({"mixed_shards": 32, "streams": 8} | options))
