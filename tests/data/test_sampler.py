from itertools import chain

import pytest
import torch

from rld_lightning.data.sampler import EpochSampler, epoch_generator


def training(size=100, batch_size=12, **options):
    return EpochSampler.for_training(size, batch_size, **options)


def batches(sampler):
    return [sampler.positions[step].tolist() for step in sampler.steps]


def random_numbers(seed, epoch):
    return torch.randint(1 << 60, (4,), generator=epoch_generator(seed, epoch)).tolist()


def test_epoch_generator_depends_on_seed_and_epoch_only():
    assert random_numbers(3, 5) == random_numbers(3, 5)
    streams = {tuple(random_numbers(seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(streams) == 400


def test_epoch_generator_does_not_change_the_global_state():
    before = torch.get_rng_state()
    random_numbers(0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_visits_every_position_in_batches():
    sampler = training()
    assert [len(batch) for batch in batches(sampler)] == [12] * 8 + [4]
    assert sampler.positions.tolist() == list(range(100))
    assert len(training(50_000, 64)) == 782
    assert len(training(50_000, 64, drop_last=True)) == 781


@pytest.mark.parametrize(
    ("size", "batch_size", "world_size", "last"),
    [
        (65, 64, 1, [64, 0]),
        (66, 64, 2, [64, 65, 0, 1]),
        (67, 64, 2, [64, 65, 66, 0]),
        (68, 64, 1, [64, 65, 66, 67]),
        (1, 64, 1, [0, 0]),
        (3, 1, 1, [2]),  # like all others
        (5, 2, 2, [4, 0]),
    ],
)
def test_no_process_gets_a_last_batch_of_one_image(size, batch_size, world_size, last):
    ranks = [batches(training(size, batch_size, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert list(chain(*(rank[-1] for rank in ranks))) == last
    assert set(chain(*chain(*ranks))) == set(range(size))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_ranks_together_get_the_global_batches(world_size, drop_last):
    alone = batches(training(drop_last=drop_last))
    ranks = [batches(training(drop_last=drop_last, rank=r, world_size=world_size)) for r in range(world_size)]
    together = [list(chain(*step)) for step in zip(*ranks, strict=True)]

    full = slice(None) if drop_last else slice(-1)
    assert together[full] == alone[full]
    if not drop_last:
        filling = -len(alone[-1]) % world_size
        assert together[-1] == alone[-1] + list(range(filling))


def test_last_training_batch_gives_each_rank_an_equal_share():
    # One sample remains for three processes, and none may train on a single one.
    ranks = [batches(training(13, 12, rank=rank, world_size=3)) for rank in range(3)]
    assert [rank[-1] for rank in ranks] == [[12, 0], [1, 2], [3, 4]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("size", "batch_size"), [(100, 12), (101, 100), (7, 512), (1025, 512), (97, 5), (11, 1)])
def test_evaluation_visits_each_sample_once_in_order(world_size, size, batch_size):
    ranks = [
        batches(EpochSampler.for_evaluation(size, batch_size, rank=r, world_size=world_size)) for r in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    assert all(batch for rank in ranks for batch in rank)
    together = [list(chain(*step)) for step in zip(*ranks, strict=True)]
    assert list(chain(*together)) == list(range(size))
    assert max(map(len, together)) <= max(batch_size, 2 * world_size)


def test_evaluation_batches_of_cifar_have_one_shape_by_default():
    assert {len(batch) for batch in batches(EpochSampler.for_evaluation(10_000, 512))} == {500}


def test_order_is_a_new_permutation_in_each_epoch():
    sampler = training(seed=1)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(sampler.draw_order()[0].tolist())
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert training(shuffle=False).draw_order()[0].tolist() == list(range(100))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: training(batch_size=10, world_size=3),
            r"batch_size=10 .* 3 processes: choose a positive multiple of 3",
        ),
        (lambda: training(size=8, drop_last=True), "data.drop_last=true leaves no training batch: 8 images"),
        (lambda: EpochSampler.for_evaluation(10, 0), "eval_batch_size=0 must be at least 1"),
        (lambda: EpochSampler.for_evaluation(2, 8, world_size=3), "2 images cannot be evaluated by 3 processes"),
    ],
)
def test_errors_name_the_value_and_the_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()
