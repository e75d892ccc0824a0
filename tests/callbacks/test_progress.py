"""The progress bar in the terminal."""

import math
import re
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.demos.boring_classes import BoringModel
from rich import get_console, reconfigure

from rld_lightning.callbacks import RunProgress
from rld_lightning.callbacks.progress import _batches_in_all
from rld_lightning.console import reset_console


def trainer(max_epochs=4, max_steps=-1, batches=10, accumulate=1, callbacks=()):
    return SimpleNamespace(
        callbacks=callbacks,
        max_epochs=max_epochs,
        max_steps=max_steps,
        num_training_batches=batches,
        accumulate_grad_batches=accumulate,
        testing=False,
    )


@pytest.mark.parametrize(
    ("run", "batches"),
    [
        (trainer(), 40),
        (trainer(max_steps=15), 15),
        (trainer(max_steps=15, accumulate=2), 30),
        (trainer(max_steps=10, batches=13, accumulate=3), 26),  # an epoch has steps of 3, 3, 3, 3 and 1 batches
        (trainer(max_steps=12, batches=13, accumulate=3), 32),
        (trainer(max_epochs=None, max_steps=7, batches=math.inf, accumulate=2), 14),
        (trainer(max_epochs=-1), None),
        (trainer(max_epochs=None, max_steps=7), 7),
        (trainer(batches=math.inf), None),
    ],
)
def test_number_of_batches_follows_from_epochs_or_steps(run, batches):
    assert _batches_in_all(run) == batches


def test_time_left_uses_the_pace_since_the_start_of_this_process():
    bar = RunProgress()
    bar._began, bar._batches = (time.monotonic() - 20, 10), 20  # 2 s a batch, after a run that went on from 10
    assert bar.seconds_left(trainer()) == pytest.approx(40, rel=0.01)
    assert bar.seconds_left(trainer(max_epochs=-1)) is None
    timer = Timer(timedelta(seconds=30))  # trainer.max_time
    timer.time_elapsed = lambda _: 5.0
    assert bar.seconds_left(trainer(callbacks=[timer])) == 25
    assert bar.seconds_left(trainer(max_epochs=-1, callbacks=[timer])) == 25
    timer.time_elapsed = lambda _: -90.0
    assert bar.seconds_left(trainer(callbacks=[timer])) == pytest.approx(40, rel=0.01)
    bar._batches = 10
    assert bar.seconds_left(trainer()) is None  # unknown at the first batch


def test_bar_counts_the_last_batch_of_a_run_that_ends_within_an_epoch(tmp_path):
    counted = []

    class Looks(RunProgress):
        def on_train_end(self, *arguments):
            counted.append(self.progress.tasks[0].completed)
            super().on_train_end(*arguments)

    bar = Looks()
    bar._drawn = math.inf  # no redraw is due
    run = Trainer(
        default_root_dir=tmp_path, max_steps=2, limit_train_batches=5, limit_val_batches=0, callbacks=[bar],
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(BoringModel())
    assert counted == [2]


class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        step = super().training_step(batch, batch_idx)
        self.log("loss", 2.345678, prog_bar=True)
        self.log("images/s", 1234.5, prog_bar=True)
        return step

    def on_validation_epoch_end(self):
        self.log_dict({"val/top1": 54.3219, "val/top5": 90.0}, prog_bar=True)


def test_bar_is_one_line_of_80_columns_and_counts_epochs_from_1(tmp_path, monkeypatch, capsys):
    seen = []
    reset_console()  # no terminal
    monkeypatch.setattr("rld_lightning.callbacks.progress.PRINT_SECONDS", 0)

    class Looks(RunProgress):
        def on_train_batch_end(self, *arguments):
            super().on_train_batch_end(*arguments)
            table = self.progress.make_tasks_table([self.progress.tasks[0]])
            lines = get_console().render_lines(table, pad=False)
            seen.append(["".join(segment.text for segment in line) for line in lines])

    bar = Looks(refresh_rate=1_000_000)  # at each batch
    try:
        reconfigure(width=80)
        bar._console_kwargs = {"width": 80}
        run = Trainer(
            default_root_dir=tmp_path, max_epochs=200, max_steps=6, limit_train_batches=3, limit_val_batches=1,
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[bar],
            num_sanity_val_steps=0,
        )  # fmt: skip
        run.fit(Model())
        trained = capsys.readouterr().out.splitlines()
        run.test(Model(), verbose=False)
    finally:
        reconfigure()
    assert all(len(line) <= 80 for (line,) in seen)
    assert [line.split()[1] for (line,) in seen] == ["1/200"] * 3 + ["2/200"] * 3
    (line,) = seen[4]
    assert " 2/3 " in line
    assert "s left" in line
    assert "loss: 2.346 top-1 %: 54.32" in line
    assert "images/s" not in line
    lines = [line for line in trained if line.startswith("   epoch  ")]
    assert [line[:22] for line in lines[2:4]] == ["   epoch  1/200, batch", "   epoch  2/200, batch"]
    assert re.fullmatch(r"   epoch  2/200, batch 2/3, loss: 2\.346, top-1 %: 54\.32, 0 s left", lines[4])
    tested = capsys.readouterr().out
    assert tested.count("evaluate  batch ") == 64
    assert re.search(r"^evaluate  batch 64/64, 0 s left$", tested, re.MULTILINE)
    assert re.search(r"^Evaluation ━+ 64/64 0 s left *$", tested, re.MULTILINE)
