"""Checkpoints are atomic, damage is detected, and the previous one is used instead."""

import errno
import multiprocessing
import os
import random
import tempfile
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.configs import compose
from helpers.training import job, quiet_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from rld_lightning.callbacks import CheckpointFiles, Diverged, Divergence, ExactResume, LastCheckpoint, MetricsFile
from rld_lightning.callbacks.checkpoint_files import write_in_background
from rld_lightning.data import DigitsDataModule
from rld_lightning.errors import UserError
from rld_lightning.runs.checkpoint import checkpoint_exists, previous_of, read_checkpoint
from rld_lightning.runs.files import LAST, PREVIOUS
from rld_lightning.tasks.run.build import build_trainer


def checkpoint(step, **others):
    return {"global_step": step, "state_dict": {"w": torch.arange(200.0)}, "optimizer_states": [{}], **others}


@pytest.fixture
def last(tmp_path):
    """The latest of two checkpoints."""
    files = CheckpointFiles()
    for step in (1, 2):
        files.save_checkpoint(checkpoint(step), tmp_path / LAST)
    return tmp_path / LAST


def flip(path, bit=4000):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def step_of(path):
    return CheckpointFiles().load_checkpoint(path)["global_step"]


def test_previous_checkpoint_has_the_expected_name(tmp_path):
    assert previous_of(tmp_path / LAST) == tmp_path / PREVIOUS


def test_any_flipped_bit_is_detected(last):
    content = last.read_bytes()
    assert step_of(last) == 2
    for bit in random.Random(1).sample(range(8 * len(content)), 100):
        last.write_bytes(content)
        flip(last, bit)
        assert step_of(last) == 1, bit


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b""), lambda p: os.truncate(p, 900), os.unlink])
def test_previous_checkpoint_is_used_if_the_latest_is_empty_truncated_or_missing(last, damage):
    damage(last)
    assert checkpoint_exists(last)
    assert step_of(last) == 1


def test_two_damaged_checkpoints_are_refused(last):
    flip(last)
    flip(previous_of(last))
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged: .*none before it; take a copy"):
        read_checkpoint(last)
    last.unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt is gone, and .*previous\.ckpt before it is damaged; start a new"):
        read_checkpoint(last)
    previous_of(last).unlink()
    with pytest.raises(FileNotFoundError, match="there is no checkpoint to resume from"):
        read_checkpoint(last)


def test_damaged_checkpoint_does_not_replace_the_good_previous_one(last):
    flip(last)
    CheckpointFiles().save_checkpoint(checkpoint(3), last)
    assert (step_of(last), step_of(previous_of(last))) == (3, 1)


def test_weights_only_checkpoints_are_not_kept(tmp_path):
    files = CheckpointFiles()
    for step in (1, 2):
        files.save_checkpoint({"global_step": step, "state_dict": {}}, tmp_path / "best.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_failed_write_is_one_sentence(last, monkeypatch, code):
    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    words = rf"last\.ckpt cannot be written \({os.strerror(code)}\); what was there is as it was. Make room for it"
    with pytest.raises(UserError, match=words):
        CheckpointFiles().save_checkpoint(checkpoint(3), last)
    monkeypatch.undo()
    assert (step_of(last), step_of(previous_of(last))) == (2, 1)
    assert sorted(path.name for path in last.parent.iterdir()) == [LAST, PREVIOUS]


def _save_for_ever(path, in_background):
    files = CheckpointFiles()
    files.in_background = in_background
    for step in range(10**6):
        files.save_checkpoint(checkpoint(step, more=torch.zeros(200_000)), path)


def test_process_killed_while_saving_leaves_a_checkpoint(tmp_path, monkeypatch):
    """On any file system, as the temporary directory is not used."""
    monkeypatch.setenv("TMPDIR", "/dev/null/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/nowhere")
    path, chance = tmp_path / LAST, random.Random(0)
    CheckpointFiles().save_checkpoint(checkpoint(-1), path)
    for attempt in range(6):
        process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(path, attempt % 2 == 1))
        process.start()
        time.sleep(chance.uniform(0.03, 0.12))
        process.kill()
        process.join()
        assert read_checkpoint(path)[1] == path, "and no one before it is needed"
    for left in tmp_path.glob(".*.tmp"):
        os.utime(left, (0, 0))
    CheckpointFiles().save_checkpoint(checkpoint(0), path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [LAST, PREVIOUS]


@pytest.fixture
def disk(monkeypatch):
    """A disk that waits for ``free`` before anything is safe on it, and fails while ``full`` is set."""
    state, sync = SimpleNamespace(free=threading.Event(), full=False), os.fsync

    def slow(descriptor):
        assert state.free.wait(60)
        if state.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    yield state
    state.free.set()


def test_file_written_in_the_background_is_of_the_moment_when_it_was_saved(tmp_path, disk):
    files, path = CheckpointFiles(), tmp_path / LAST
    files.in_background = True
    weights, rows = torch.arange(6.0).view(1, 2, 1, 3).contiguous(memory_format=torch.channels_last), [{"epoch": 0}]
    state = torch.nn.Linear(2, 2).state_dict() | {"w": weights}
    state._metadata = {"": {"version": 7}}
    saved = {"state_dict": state, "optimizer_states": [{"state": {0: {"m": weights}}}], "metrics": rows, "other": {}}
    files.save_checkpoint(saved, path)
    weights.zero_()
    saved["optimizer_states"][0]["lr"] = saved["other"]["more"] = 1.0
    files.check()  # does not wait
    assert not path.exists()
    disk.free.set()
    found = files.load_checkpoint(path)  # waits
    assert torch.equal(found["state_dict"]["w"].flatten(), torch.arange(6.0))
    assert found["state_dict"]["w"].stride() == weights.stride()
    assert torch.equal(found["optimizer_states"][0]["state"][0]["m"], found["state_dict"]["w"])
    assert found["state_dict"]._metadata == {"": {"version": 7}}
    assert (list(found["optimizer_states"][0]), found["metrics"], found["other"]) == (["state"], [{"epoch": 0}], {})


def test_files_are_written_in_the_order_in_which_they_are_saved(tmp_path):
    files, path = CheckpointFiles(), tmp_path / LAST
    for step, files.in_background in enumerate([True, True, False, True, False], 1):
        files.save_checkpoint(checkpoint(step, more=torch.zeros(100_000)), path)
    assert (step_of(path), step_of(previous_of(path))) == (5, 4)
    files.in_background = True
    files.save_checkpoint(checkpoint(6), path)
    files.remove_checkpoint(path)
    assert not path.exists()
    assert step_of(path) == 5  # the previous one


def test_background_write_that_fails_is_one_sentence_at_the_next_use(last, disk):
    files = CheckpointFiles()
    files.in_background = disk.full = True
    disk.free.set()
    uses = [files.wait, files.teardown, lambda: files.load_checkpoint(last), lambda: files.save_checkpoint({}, last)]
    for use in uses:
        files.save_checkpoint(checkpoint(3), last)
        with pytest.raises(
            UserError, match=r"last\.ckpt cannot be written \(No space left on device\); what was there"
        ):
            use()
        files.teardown()  # says it once
    assert (step_of(last), step_of(previous_of(last))) == (2, 1)
    assert sorted(path.name for path in last.parent.iterdir()) == [LAST, PREVIOUS]


class At(Callback):
    """Does something at the end of a step."""

    def __init__(self, step, do):
        self.step, self.do, self.steps = step, do, 0

    def on_train_batch_end(self, trainer, *_):
        self.steps = trainer.global_step
        if trainer.global_step == self.step:
            self.do()


def train(folder, *callbacks, epochs=3, resume=None, **options):
    last, options = LastCheckpoint(folder), {"limit_train_batches": 4, "limit_val_batches": 1} | options
    trainer = quiet_trainer(*callbacks, last, ExactResume(), max_epochs=epochs, plugins=[CheckpointFiles()], **options)
    trainer.fit(job(momentum=0.9), DigitsDataModule(batch_size=16), ckpt_path=resume, weights_only=True)
    return trainer.lightning_module.state_dict()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # of a buffer that is still in use
@pytest.mark.parametrize("end", [None, KeyError("stop"), SystemExit(143)])
def test_run_goes_on_while_its_checkpoint_is_written_and_waits_for_it_at_its_end(tmp_path, disk, end):
    def stop():
        assert not (tmp_path / LAST).exists()
        threading.Timer(0.3, disk.free.set).start()
        if end is not None:
            raise end

    if end is None:
        train(tmp_path, At(5, stop))
    else:
        with pytest.raises(type(end)):
            train(tmp_path, At(5, stop))
    assert step_of(tmp_path / LAST) == (12 if end is None else 4)
    whole = train(tmp_path / "whole")
    rest = train(tmp_path, resume=tmp_path / LAST)
    assert all(torch.equal(rest[name], value) for name, value in whole.items())


def test_disk_that_is_full_in_the_background_stops_the_run_within_steps(tmp_path, disk):
    def fill():
        disk.full = True
        disk.free.set()
        time.sleep(0.5)

    at = At(5, fill)
    with pytest.raises(UserError, match=r"last\.ckpt cannot be written \(No space left on device\)"):
        train(tmp_path, at)
    assert at.steps <= 6
    assert list(tmp_path.iterdir()) == []


def test_divergence_names_the_checkpoint_that_is_being_written(tmp_path, disk):
    class Spoil(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 6:
                threading.Timer(0.3, disk.free.set).start()
                pl_module.student[1].weight.data[0, 0] = torch.nan

    with pytest.raises(Diverged, match="Resume from before that with"):
        train(tmp_path, Spoil(), Divergence(tmp_path, every=7))
    assert step_of(tmp_path / LAST) == 4


class Reads(Logger):
    """Reads each checkpoint as it is saved, as loggers that upload it do."""

    name = version = ""

    def __init__(self):
        super().__init__()
        self.steps = []

    def log_metrics(self, *_, **__):
        pass

    def log_hyperparams(self, *_, **__):
        pass

    def after_save_checkpoint(self, checkpoint_callback):
        self.steps.append(step_of(checkpoint_callback.best_model_path))


def test_logger_that_reads_checkpoints_finds_each(tmp_path):
    train(tmp_path, logger=(reads := Reads()))
    assert reads.steps == [4, 8, 12]
    for logger, in_background in ((MetricsFile(tmp_path), True), (reads, False)):
        files = CheckpointFiles()
        with write_in_background(SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=files), loggers=[logger])):
            assert files.in_background is in_background
        assert not files.in_background


def fit(folder, epochs, resume=None):
    module = job(momentum=0.9)
    callback = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    options = {"limit_train_batches": 2, "limit_val_batches": 1, "plugins": [CheckpointFiles()]}
    trainer = quiet_trainer(callback, max_epochs=epochs, **options)
    trainer.fit(module, DigitsDataModule(batch_size=16), ckpt_path=resume, weights_only=True)
    return module.state_dict()


def test_run_resumed_from_the_previous_checkpoint_reaches_the_same_weights(tmp_path):
    expected = fit(tmp_path, 3)
    assert step_of(previous_of(tmp_path / LAST)) == 4
    flip(tmp_path / LAST)
    found = fit(tmp_path, 3, resume=tmp_path / LAST)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_every_run_uses_checkpoint_files(tmp_path):
    trainer = build_trainer(compose("trainer=cpu", f"paths.run={tmp_path}"))
    assert isinstance(trainer.strategy.checkpoint_io, CheckpointFiles)
