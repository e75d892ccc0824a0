"""What a network takes: counted, in order, and an error is said instead of raised."""

import pytest
from helpers.exports import digits_run

from rld_lightning.bench.latency import Contender, measure, measure_alone


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


def test_what_does_not_run_is_said(contender, tmp_path):
    wrong = Contender("resnet8", contender.weights, 7, (3, 8, 8), "eager")
    assert "the file has 10 classes, the model 7" in measure(wrong, (1,), 0.01, 1).error


@pytest.mark.slow
def test_memory_is_that_of_the_network_alone(contender):
    small, large = (measure_alone(contender, (size,), 0.05, 1, "cpu") for size in (1, 4096))
    assert small.error == large.error == ""
    images = 4096 * 3 * 8 * 8 * 4 / 1e6
    if small.peak_mb is not None:
        assert large.peak_mb > small.peak_mb + images
