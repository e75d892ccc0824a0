"""Latency and memory of a network; errors are returned instead of raised."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.exports import digits_run

from rld_lightning.bench.latency import Contender, measure, measure_alone
from rld_lightning.models import imported, trust


@pytest.fixture
def contender(tmp_path):
    digits_run(tmp_path / "run")
    return Contender("resnet8", str(tmp_path / "run" / "student.safetensors"), 10, (3, 8, 8), "eager")


def test_percentiles_are_of_the_batches_that_were_timed(contender):
    found = measure(contender, (4, 1), 0.05, 1)
    assert found.error == ""
    assert [latency.batch_size for latency in found.latencies] == [1, 4]
    for latency in found.latencies:
        assert latency.batches >= 10
        assert 0 < latency.p50 <= latency.p90 <= latency.p99
        assert latency.images_per_s == pytest.approx(1000 * latency.batch_size / latency.p50)


def test_a_failure_is_returned_as_an_error(contender, tmp_path):
    wrong = Contender("resnet8", contender.weights, 7, (3, 8, 8), "eager")
    assert "the file has 10 classes, the model 7" in measure(wrong, (1,), 0.01, 1).error


def test_an_external_network_is_measured_only_if_it_is_trusted(contender, monkeypatch):
    monkeypatch.setattr("rld_lightning.models.imported._named", set())
    monkeypatch.setattr("rld_lightning.bench.latency.ProcessPoolExecutor", Here)
    other = Contender("rld_lightning.models.cifar.resnet:resnet8@16", contender.weights, 10, (3, 8, 8), "eager")
    with pytest.raises(ValueError, match="named by a file and not by you"):
        measure_alone(other, (1,), 0.01, 1, "cpu")
    trust([other.name])
    assert measure_alone(other, (1,), 0.01, 1, "cpu").error == ""


class Here(ThreadPoolExecutor):
    """Stands for a fresh process, where no name is trusted."""

    def __init__(self, workers, mp_context):
        super().__init__(workers)

    def submit(self, *args):
        imported._named.clear()
        return super().submit(*args)


@pytest.mark.slow
def test_memory_is_that_of_the_network_alone(contender):
    small, large = (measure_alone(contender, (size,), 0.05, 1, "cpu") for size in (1, 4096))
    assert small.error == large.error == ""
    images = 4096 * 3 * 8 * 8 * 4 / 1e6
    if small.peak_mb is not None:
        assert large.peak_mb > small.peak_mb + images
