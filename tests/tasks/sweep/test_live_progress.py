"""The live display of a running sweep."""

import pickle
from pathlib import Path

import pytest
from helpers.run_factory import write_run
from helpers.sweeps import begin_sweep
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from rich.console import Console

from rld_lightning.console import duration
from rld_lightning.errors import UserError
from rld_lightning.runs.events import EVENTS, Events, log_event
from rld_lightning.tasks.sweep import callback as sweep
from rld_lightning.tasks.sweep import live_progress as watching
from rld_lightning.tasks.sweep.live_progress import LiveProgress


@pytest.fixture
def watch(tmp_path):
    watch = LiveProgress(tmp_path)
    yield watch
    watch.stop()


def begins(number, time, known=False):
    return {"state": "begins", "number": number, "time": time, "trial": f"x={number}", "known": known}


def ends(number, time, **result):
    return {"state": "ends", "number": number, "time": time, "trial": f"x={number}", **result}


def test_numbers_of_trials_best_so_far_and_time_left(watch, capsys):
    watch.process({"total": 8})
    for event in (begins(0, 0), begins(1, 0), ends(0, 100, top1=50.0), begins(2, 100), ends(1, 200, error="oom")):
        watch.process(event)
    # Of one that ended well there are 100 s; 5 wait and one has run for half of that, two at a time.
    assert watch.line(now=150) == "1/8 done, 1 running, 1 failed, 5 min left, best 50.00 %: x=0"
    watch.process(ends(2, 300, top1=60.0, ended_after=3))
    assert watch.line(now=300).endswith("best 60.00 %: x=2")
    assert watch.failed == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "trial 1/8 x=0 50.00 % 2 min",
        "failed 2/8 x=1: oom",
        "trial 3/8 x=2 60.00 %, ended after epoch 3 3 min",
    ]


def test_trials_finished_earlier_take_no_time(watch, capsys):
    for event in ({"total": 2}, begins(0, 0, known=True), ends(0, 1, top1=50.0)):
        watch.process(event)
    assert watch.line(now=1) == "1/2 done, 0 running, best 50.00 %: x=0"
    assert "50.00 %  already done" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (7800, "2 h 10 min")])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_live_line_fits_a_narrow_terminal_and_is_removed(tmp_path, monkeypatch):
    console = Console(width=40, force_terminal=True, record=True, highlight=False)
    monkeypatch.setattr(watching, "console", console)
    watch = LiveProgress(tmp_path)
    log_event(tmp_path, total=3)
    log_event(tmp_path, state="begins", number=0, trial="a.long.key=1", known=False)
    log_event(tmp_path, state="ends", number=0, trial="a.long.key=1 another.long.key=2", top1=50.0)
    watch.stop()
    (line,) = console.render_lines(watch._text(), pad=False)
    assert "".join(segment.text for segment in line).startswith("   sweep  1/3 done, 0 running")
    assert line[-1].text.endswith("…")


def test_incomplete_line_is_read_later(tmp_path):
    events = Events(tmp_path)
    log_event(tmp_path, total=3)
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"total"')
    assert [event["total"] for event in events.new()] == [3]
    with (tmp_path / EVENTS).open("a") as file:
        file.write(": 4}\n")
    assert [event["total"] for event in events.new()] == [4]
    assert list(Events(tmp_path).new()) == []  # another sweep in the folder begins anew


def test_unreadable_events_do_not_stop_the_display(watch, tmp_path, capsys):
    for text in (
        "not JSON",
        '"a text"',
        '{"state": "begins"}',
        '{"state": "ends", "number": 1, "time": "x"}',
        "\udcff",
    ):
        with (tmp_path / EVENTS).open("a", errors="surrogateescape") as file:
            file.write(f"{text}\n")
    log_event(tmp_path, total=1)
    log_event(tmp_path, state="ends", number=0, trial="x=0", top1=50.0)
    watch.stop()
    assert " ".join(capsys.readouterr().out.split()).endswith("x=0 50.00 % 0 s")


def test_trial_logs_its_end_in_any_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "is_trial", lambda: True)
    config, callback = begin_sweep("loss.alpha=1,2", "recipe=quick", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    callback.callback._watch.stop()
    callback = pickle.loads(pickle.dumps(callback))  # as launchers do
    events = Events(tmp_path / "sweep")
    config.hydra.overrides.task = ["loss.alpha=2.718281828", "recipe=quick"]
    config.hydra.runtime.output_dir = str(tmp_path / "sweep" / "loss.alpha=2")
    config.hydra.job.num = 5
    callback.on_job_start(config)
    for value in (60.0, 61.0, UserError("out of memory"), KeyError("bug")):
        if value == 61.0:
            write_run(Path(config.hydra.runtime.output_dir), epochs=4, summary={"steps": 63, "scheduled_steps": 126})
        returned = JobReturn(status=JobStatus.COMPLETED if isinstance(value, float) else JobStatus.FAILED)
        returned.return_value = value
        callback.on_job_end(config, returned)
    keys = ("state", "number", "trial", "known", "top1", "ended_after", "error")
    assert [{key: event[key] for key in keys if key in event} for event in events.new()] == [
        {"state": "begins", "number": 5, "trial": "loss.alpha=2.718", "known": False},
        {"state": "ends", "number": 5, "trial": "loss.alpha=2.718", "top1": 60.0},
        {"state": "ends", "number": 5, "trial": "loss.alpha=2.718", "top1": 61.0, "ended_after": 4},
        {"state": "ends", "number": 5, "trial": "loss.alpha=2.718", "error": "out of memory"},
        {"state": "ends", "number": 5, "trial": "loss.alpha=2.718", "error": "KeyError: 'bug'"},
    ]
    assert OmegaConf.select(config, "hydra.callbacks.sweep.watch")
    assert Path(config.hydra.sweep.dir).exists()
