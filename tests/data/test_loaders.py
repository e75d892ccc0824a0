"""The loaders of every kind of data: an epoch is a function of its number, whatever the processes and interruptions."""

import pytest
import torch
from helpers.data import epoch_of, merge, part, ready, same
from helpers.shards import folder_data, pack_folder, shards_data, write_images

from rld_lightning.data import DigitsDataModule

pytest.importorskip("webdataset")


def digits(root, rank=0, world_size=1, **options):
    return ready(DigitsDataModule(subset=0.05, batch_size=12, eval_batch_size=25, **options), rank, world_size)


CASES = {
    "memory": (digits, {}),
    "memory, two views": (digits, {"strong_view": True}),
    "folder, two views": (folder_data, {"strong_view": True}),
    "shards": (shards_data, {}),
    "shards, all mixed": (shards_data, {"mixed_shards": None}),
    "shards, 4 streams": (shards_data, {"streams": 4}),
}
WITH_WORKERS = {
    "folder, a worker": (folder_data, {"num_workers": 1}),
    "shards, workers": (shards_data, {"num_workers": 2}),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder of 45 training and 18 test images, and its shards of about four images."""
    root = tmp_path_factory.mktemp("loaders")
    write_images(root / "images")
    pack_folder(root / "images", root / "shards")
    return {folder_data: root / "images", shards_data: root / "shards", digits: None}


@pytest.fixture
def make(places, request):
    """Makes the data of a case, in a process of several."""
    kind, given = (CASES | WITH_WORKERS)[request.param]
    return lambda rank=0, world_size=1, **options: kind(places[kind], rank, world_size, **given, **options)


def of_each(cases):
    return pytest.mark.parametrize("make", cases, indirect=True)


def train_epoch(make, epoch, *process):
    return epoch_of(make(*process).train_dataloader(), epoch)


@of_each(CASES)
def test_an_iterator_created_before_set_epoch_draws_that_epoch(make):
    loader = make().train_dataloader()
    iterator = iter(loader)
    loader.sampler.set_epoch(3)
    assert same(list(iterator), train_epoch(make, 3))


@of_each(CASES | WITH_WORKERS)
def test_an_epoch_is_resumed_at_any_batch(make):
    loader = make().train_dataloader()
    loader.sampler.set_epoch(2)
    iterator = iter(loader)
    begun = [next(iterator) for _ in range(4)]
    resumed, next_one = make().train_dataloader(), train_epoch(make, 3)
    resumed.load_state_dict(loader.state_dict())
    assert same([*begun, *epoch_of(resumed, 2)], train_epoch(make, 2))
    assert same(epoch_of(resumed, 3), next_one)
    at_the_end = make().train_dataloader()
    at_the_end.load_state_dict({"epoch": 2, "batch": len(at_the_end)})
    assert same(epoch_of(at_the_end, 3), next_one)


@of_each(CASES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_global_batches_do_not_depend_on_the_number_of_ranks(make, world_size):
    alone = train_epoch(make, 1)
    together = [
        merge(step) for step in zip(*(train_epoch(make, 1, r, world_size) for r in range(world_size)), strict=True)
    ]
    assert same(together[:-1], alone[:-1])
    size = len(alone[-1].label)
    assert size < len(alone[0].label)
    assert same([part(together[-1], size)], alone[-1:])

    tests = [list(make(rank, world_size).test_dataloader()) for rank in range(world_size)]
    assert sorted(torch.cat([batch.index for rank in tests for batch in rank]).tolist()) == list(
        range(make().test_size)
    )
    assert len({len(rank) for rank in tests}) == 1


@of_each(CASES | WITH_WORKERS)
def test_loading_does_not_change_the_global_random_state(make):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    data = make()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)
