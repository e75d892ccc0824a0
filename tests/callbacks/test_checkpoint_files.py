"""Checkpoints are atomic, damage is detected, and the previous one is used instead."""

import errno
import multiprocessing
import os
import random
import tempfile
import time

import pytest
import torch
from helpers.configs import compose
from helpers.training import job, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rld_lightning.callbacks import CheckpointFiles
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


def _save_for_ever(path):
    files = CheckpointFiles()
    for step in range(10**6):
        files.save_checkpoint(checkpoint(step, more=torch.zeros(200_000)), path)


def test_process_killed_while_saving_leaves_a_checkpoint(tmp_path, monkeypatch):
    """On any file system, as the temporary directory is not used."""
    monkeypatch.setenv("TMPDIR", "/dev/null/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/nowhere")
    path, chance = tmp_path / LAST, random.Random(0)
    CheckpointFiles().save_checkpoint(checkpoint(-1), path)
    for _ in range(6):
        process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(path,))
        process.start()
        time.sleep(chance.uniform(0.03, 0.12))
        process.kill()
        process.join()
        assert read_checkpoint(path)[1] == path, "and no one before it is needed"
    for left in tmp_path.glob(".*.tmp"):
        os.utime(left, (0, 0))
    CheckpointFiles().save_checkpoint(checkpoint(0), path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [LAST, PREVIOUS]


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
