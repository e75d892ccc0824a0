"""Signals to stop or to save."""

import os
import signal

import pytest
import torch
from helpers.training import job, quiet_trainer
from lightning.pytorch import Callback

from rld_lightning.callbacks import ExactResume, LastCheckpoint, StopSignals
from rld_lightning.data import DigitsDataModule
from rld_lightning.distributed import Stopped, exit_now, stop_on_signals, stopped_by

BATCHES = 12  # an epoch


class Sends(Callback):
    """Sends signals to this process before a training batch, or a validation batch of the first epoch."""

    def __init__(self, *signals, train=None, validation=None):
        self.signals, self.train, self.validation = signals, train, validation
        self.batches = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._send(self.batches == self.train)
        self.batches += 1

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self._send(trainer.current_epoch == 0 and batch_idx == self.validation)

    def _send(self, now):
        _kill(*(self.signals if now else ()))


def fit(folder, *callbacks, resume=None, **options):
    module, signals = job(momentum=0.9), StopSignals()
    trainer = quiet_trainer(*callbacks, LastCheckpoint(folder), ExactResume(), max_epochs=2, **options)
    trainer.callbacks.append(signals)
    try:
        with signals.handling():
            trainer.fit(module, DigitsDataModule(batch_size=128), ckpt_path=resume, weights_only=True)
    finally:
        trainer.steps = trainer.global_step
    return module, trainer


@pytest.fixture(autouse=True)
def _heard():
    """Restores default handlers: a shell makes background processes ignore some signals."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns the uninterrupted run."""
    module, trainer = fit(tmp_path_factory.mktemp("whole"))
    return module.state_dict(), trainer.callback_metrics


@pytest.mark.thinned(4)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("place", "step"), [({"train": 4}, 5), ({"train": BATCHES - 1}, BATCHES), ({"validation": 1}, BATCHES)]
)
def test_stop_saves_at_the_end_of_the_step_and_the_run_resumes_there(tmp_path, whole, number, place, step):
    before = {each: signal.getsignal(each) for each in (number, signal.SIGUSR1)}
    with pytest.raises(Stopped) as stop:
        fit(tmp_path, Sends(number, **place))
    assert stop.value.code == 128 + number
    assert {each: signal.getsignal(each) for each in before} == before
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step
    weights, metrics = whole
    module, trainer = fit(tmp_path, resume=tmp_path / "last.ckpt")
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert trainer.callback_metrics == metrics


def test_stop_waits_for_the_optimizer_step(tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path, Sends(signal.SIGTERM, train=4), accumulate_grad_batches=4)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] == 8


def test_sigusr1_saves_and_training_continues(tmp_path, whole, capsys):
    class Look(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 5:
                self.step = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]

    look = Look()
    module, _ = fit(tmp_path, Sends(signal.SIGUSR1, train=4), look)
    assert look.step == 5
    assert all(torch.equal(value, whole[0][name]) for name, value in module.state_dict().items())
    assert capsys.readouterr().out.split() == ["saved", "as", "it", "is", "in", "epoch", "1"]


def test_slurm_job_is_requeued_on_sigusr1(tmp_path, monkeypatch, capsys):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in (("JOB_ID", "73"), ("ARRAY_JOB_ID", "71"), ("ARRAY_TASK_ID", "2"), ("JOB_NAME", "rld")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(Stopped) as stop:
        fit(tmp_path, Sends(signal.SIGUSR1, train=4))
    assert stop.value.code == 138
    assert (tmp_path / "asked").read_text() == "requeue 71_2\n"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 5
    assert "job 71_2 is queued again" in capsys.readouterr().out


def test_second_signal_does_not_wait(tmp_path):
    sends = Sends(signal.SIGINT, signal.SIGINT, train=4)
    with pytest.raises(Stopped) as stop:
        fit(tmp_path, sends)
    assert stop.value.code == 130
    assert not (tmp_path / "last.ckpt").exists()


def test_signal_before_the_first_step_ends_at_once(tmp_path):
    class Early(Callback):
        def on_fit_start(self, trainer, module):
            _kill(signal.SIGUSR1, signal.SIGHUP)  # there is nothing to save yet

    with pytest.raises(Stopped) as stop:
        fit(tmp_path, Early())
    assert stop.value.code == 129


def test_ignored_signals_stay_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        _, trainer = fit(tmp_path, Sends(signal.SIGHUP, train=4))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.steps == 2 * BATCHES


def test_worker_killed_by_the_same_signal_is_not_an_error(tmp_path):
    class Fails(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == 4:
                raise RuntimeError("DataLoader worker exited unexpectedly")

    with pytest.raises(Stopped):
        fit(tmp_path, Sends(signal.SIGINT, train=4), Fails())
    with pytest.raises(RuntimeError):
        fit(tmp_path, Fails())


def _kill(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def test_signals_outside_training_end_the_process():
    for number in (signal.SIGTERM, signal.SIGHUP):
        with stop_on_signals(), pytest.raises(Stopped) as stop:
            _kill(signal.SIGUSR1, number)
        assert stop.value.code == 128 + number


def test_exit_now_flushes_the_output(capfd):
    if (child := os.fork()) == 0:
        print("written", end="")
        exit_now(143)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert capfd.readouterr().out == "written"


@pytest.mark.parametrize(("codes", "number"), [([143, 143], 15), ([138, 130], 10), ([143, 1], None), ([], None)])
def test_exit_statuses_of_stopped_processes(codes, number):
    assert stopped_by(codes) == number
