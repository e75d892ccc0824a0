"""Means over an epoch, compared with a recount, also for two simulated ranks."""

import pytest
import torch

from rld_lightning.metrics import EpochMeans


def means(*batches):
    result = EpochMeans()
    for values, weight in batches:
        result.update({name: torch.tensor(value) for name, value in values.items()}, weight)
    return result


def alone(tensor, reduce_op):
    assert reduce_op == "sum"
    return tensor


def test_means_are_weighted_by_samples():
    counted = means(({"a": 1.0, "b": 2.0}, 3), ({"a": 5.0, "b": 4.0}, 1))
    assert counted.compute(alone) == {"a": torch.tensor(2.0), "b": torch.tensor(2.5)}


def test_reset_clears_the_means():
    counted = means(({"a": 1.0}, 2))
    assert counted.compute(alone) == counted.compute(alone) == {"a": torch.tensor(1.0)}
    counted.reset()
    assert counted.compute(alone) == {}
    counted.update({"a": torch.tensor(7.0)}, 1)
    assert counted.compute(alone) == {"a": torch.tensor(7.0)}


def test_ranks_are_combined_by_one_reduction():
    ranks = [means(({"a": 1.0}, 3)), means(({"a": 9.0}, 1))]
    calls = []

    def reduce(tensor, reduce_op):
        calls.append(tensor)
        return sum(rank._totals for rank in ranks) if len(calls) == 1 else tensor

    assert ranks[0].compute(reduce)["a"].item() == pytest.approx(3.0)
    assert len(calls) == 1


def test_means_are_detached():
    value = torch.ones((), requires_grad=True) * 2
    counted = EpochMeans()
    counted.update({"a": value}, 1)
    assert not counted.compute(alone)["a"].requires_grad


def test_the_samples_of_all_ranks_are_counted():
    counted = means(({"a": 1.0}, 3), ({"a": 5.0}, 1), ({"a": float("nan")}, 0))
    counted.compute(lambda tensor, reduce_op: 2 * tensor)  # two ranks with the same
    assert counted.samples == 8


@pytest.mark.parametrize(("then", "now"), [(1, 1), (2, 2), (2, 1), (1, 2), (3, 2)])
def test_resuming_with_the_same_or_another_number_of_processes(monkeypatch, then, now):
    everyone = [means(({"a": 1.0, "b": float(rank)}, 2 + rank)) for rank in range(then)]
    states = [counted.state_dict()[0] for counted in everyone]
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: now)
    resumed = []
    for rank in range(now):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        resumed.append(EpochMeans())
        resumed[-1].load_state_dict(states)
    total = sum(counted._totals for counted in resumed if counted._totals is not None)
    assert total.equal(sum(counted._totals for counted in everyone))
    if then == now:
        assert all(a._totals.equal(b._totals) for a, b in zip(everyone, resumed, strict=True))
