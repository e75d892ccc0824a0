"""Processes that are measured in turn."""

import sys
import time

import pytest

from rld_lightning.bench.jobs import Contender

STEPS = "import sys, time\nwhile True:\n    time.sleep(0.01)\n    open(sys.argv[1], 'a').write(f'{time.time()}\\n')"


def test_a_contender_computes_only_in_its_turn_and_ends(tmp_path):
    contender = Contender([sys.executable, "-c", STEPS, str(tmp_path / "times")], tmp_path)
    with contender.running():
        time.sleep(0.05)  # for what it was about to write
        before = contender.times.read_text()
        time.sleep(0.1)
        assert contender.times.read_text() == before
        contender.measure(0.1, batch=64)
    assert contender.first_step > 0
    assert 640 < contender.rates[0] < 6400
    assert contender.process.returncode < 0


def test_a_contender_that_fails_shows_what_it_printed(tmp_path):
    contender = Contender([sys.executable, "-c", "raise SystemExit('no such data')"], tmp_path)
    with pytest.raises(RuntimeError, match="no such data"), contender.running():
        pass
