"""Parallel trials: how many, on which GPU, and what happens if one is killed."""

import os
import pickle
import signal
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from rld_lightning import forked_processes
from rld_lightning.distributed import TRIALS, Stopped, trials_at_once
from rld_lightning.errors import UserError
from rld_lightning.hydra import gpu_shares
from rld_lightning.hydra.sweeps import side_by_side
from rld_lightning.hydra.sweeps.side_by_side import Jobs


@pytest.fixture
def with_gpus(monkeypatch):
    """Makes PyTorch report a number of GPUs, some of them visible."""

    def have(count, visible=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return have


@pytest.mark.parametrize(
    ("count", "visible", "accelerator", "devices", "shares"),
    [
        (4, None, "auto", "auto", ["0", "1", "2", "3"]),
        (4, None, "gpu", 1, ["0", "1", "2", "3"]),
        (4, None, "gpu", 2, ["0,1", "2,3"]),
        (5, None, "gpu", "2", ["0,1", "2,3"]),
        (3, "5, 2,GPU-8c", "auto", -1, ["5", "2", "GPU-8c"]),
        (1, None, "auto", "auto", ["0"]),
        (0, None, "auto", "auto", []),
        (0, "", "auto", "auto", []),
        (4, None, "cpu", 1, []),
        (4, None, "gpu", [1, 3], []),  # as in the command
        (1, None, "gpu", 2, []),
    ],
)
def test_each_trial_gets_its_own_gpus(with_gpus, count, visible, accelerator, devices, shares):
    with_gpus(count, visible)
    assert gpu_shares.gpu_shares(OmegaConf.create({"accelerator": accelerator, "devices": devices})) == shares
    assert gpu_shares.trials_at_once(accelerator, devices) == (len(shares) or 2)


def test_more_trials_than_gpus_use_them_in_turn(with_gpus, sweep):
    with_gpus(2)
    jobs = sweep(5, accelerator="auto")
    assert [jobs.environment(slot) for slot in range(5)] == [
        {"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("0", "1", "0", "1", "0")
    ]
    assert sweep(5, accelerator="cpu").environment(0) == {}
    with pytest.raises(UserError, match=r"hydra\.launcher\.n_jobs=0 must be 1 or more"):
        sweep(0)


def test_processes_know_how_many_trials_share_the_machine(monkeypatch):
    monkeypatch.delenv(TRIALS, raising=False)
    assert trials_at_once() is None
    monkeypatch.setenv(TRIALS, "3")
    assert trials_at_once() == 3


class Machine:
    """Fake processes that end with given exit statuses after given numbers of polls."""

    def __init__(self, ends):
        self.ends, self.started, self.running, self.most, self.signals = ends, [], 0, 0, []

    def start(self, command, env):
        folder, number = Path(command[3]), int(command[4])
        self.started.append((number, env[TRIALS], env.get("CUDA_VISIBLE_DEVICES")))
        self.running += 1
        self.most = max(self.most, self.running)
        return SimpleNamespace(pid=10**9 + number, folder=folder, number=number, looks=0, code=None)

    def poll(self, process):
        process.looks += 1
        code, looks = self.ends.get(process.number, (0, 1 + process.number % 2))
        if process.code is None and (process.looks > looks or process.number in self.signals):
            process.code = code if process.number not in self.signals else 128 + signal.SIGTERM
            self.running -= 1
            if code == 0:
                returned = JobReturn(status=JobStatus.COMPLETED, _return_value=float(process.number))
                (process.folder / f"returned_{process.number}").write_bytes(pickle.dumps(returned))
        return process.code

    def kill(self, pid, number):
        self.signals.append(pid - 10**9)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Jobs of a sweep in a folder; reports of their ends are in ``told``."""
    told = []
    monkeypatch.setattr(side_by_side, "configure_log", lambda *_: None)
    monkeypatch.setattr(side_by_side.Singleton, "get_state", staticmethod(dict))
    monkeypatch.setattr(side_by_side, "HydraConfig", SimpleNamespace(instance=lambda: SimpleNamespace(set_config=id)))
    monkeypatch.setattr(side_by_side, "_POLL", 0.0)

    def load(config, overrides):
        own = deepcopy(config)
        own.hydra.sweep.subdir = overrides[0]
        return own

    context = SimpleNamespace(
        config_loader=SimpleNamespace(load_sweep_config=load),
        callbacks=SimpleNamespace(on_job_end=lambda config, job_return: told.append((config, job_return))),
    )

    def make(at_once, machine=None, **trainer):
        sweep = {"dir": str(tmp_path / "sweep"), "subdir": None}
        own = {"sweep": sweep, "hydra_logging": None, "verbose": False, "job": {"name": "fit"}, "runtime": {}}
        jobs = Jobs(context, OmegaConf.create({"trainer": trainer, "hydra": own}), float, at_once)
        jobs.context.told = told
        if machine is not None:
            monkeypatch.setattr(side_by_side, "start", machine.start)
            for place in (side_by_side, forked_processes):
                monkeypatch.setattr(place, "poll", machine.poll)
            monkeypatch.setattr(os, "kill", machine.kill)
            monkeypatch.setattr(side_by_side.cloudpickle, "dumps", lambda _: b"")
        return jobs

    return make


def test_a_killed_trial_is_reported_and_the_others_continue(with_gpus, sweep, tmp_path):
    with_gpus(2)
    machine = Machine({6: (-9, 1)})
    jobs = sweep(2, machine, accelerator="auto", devices="auto")
    returned = jobs.run([[f"x={number}"] for number in range(5)], first=3)
    assert sorted(number for number, *_ in machine.started) == [3, 4, 5, 6, 7]
    assert machine.most == 2
    assert {(trials, gpu) for _, trials, gpu in machine.started} == {("2", "0"), ("2", "1")}
    lost = returned.pop(3)
    assert [each.return_value for each in returned] == [3.0, 4.0, 5.0, 7.0]
    assert lost.status == JobStatus.FAILED
    assert "was killed by SIGKILL" in (tmp_path / "sweep" / "x=3" / "error.txt").read_text()
    ((config, told),) = jobs.context.told
    assert config.hydra.job.num == 6
    assert config.hydra.runtime.output_dir == str(tmp_path / "sweep" / "x=3")
    assert told is lost


def test_a_stopped_trial_stops_the_others(sweep, capsys):
    machine = Machine({0: (128 + signal.SIGTERM, 2), 1: (0, 10**9)})
    with pytest.raises(Stopped) as stop:
        sweep(2, machine, accelerator="cpu").run([["x=0"], ["x=1"], ["x=2"]], first=0)
    assert stop.value.signal == signal.SIGTERM
    assert machine.signals[0] == 1
    assert [number for number, *_ in machine.started] == [0, 1]
    assert "after this step, and saving; once more stops it at once" in capsys.readouterr().out
