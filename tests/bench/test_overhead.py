"""The clock of a step's overhead."""

import json

import pytest
import torch

from rld_lightning.bench import overhead
from rld_lightning.bench.overhead import StepClock, bench_overhead


def test_each_contender_records_every_step():
    for contender in (overhead._loop, overhead._lightning):
        clock = contender(torch.device("cpu"))
        assert len(clock.cpu) == len(clock.wall) == overhead._STEPS
        assert clock.wall == sorted(clock.wall)


def test_the_median_step_excludes_the_warm_up(tmp_path):
    seconds = [100.0 * i for i in range(20)] + [2000.0, 2001.0, 2003.0, 2005.0, 2105.0]
    assert overhead._median_step(seconds) == 2.0
    clock = StepClock(str(tmp_path / "times.json"))
    clock.record()
    clock.on_train_end(None, None)
    assert json.loads((tmp_path / "times.json").read_text()) == [clock.cpu, clock.wall]


@pytest.mark.slow
def test_all_contenders_are_compared(capsys):
    bench_overhead(torch.device("cpu"), rounds=1)
    said = capsys.readouterr().out
    assert all(name in said for name in ("plain loop", "Lightning, no callbacks", "fit.py loss=ce"))
