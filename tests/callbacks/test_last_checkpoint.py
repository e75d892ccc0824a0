"""When ``last.ckpt`` is written."""

import pytest
import torch
from helpers.training import job, quiet_trainer
from lightning.pytorch import Callback

from rld_lightning.callbacks import LastCheckpoint
from rld_lightning.data import DigitsDataModule


class Clock(Callback):
    """A fake clock: each training step takes a given number of seconds."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr("rld_lightning.callbacks.last_checkpoint.time.monotonic", lambda: self.now)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now += self.seconds


class Saved(LastCheckpoint):
    """Records after which steps it saved, and how often the ranks had to agree."""

    def _save_checkpoint(self, trainer, filepath):
        self.steps_saved = [*getattr(self, "steps_saved", []), trainer.global_step]
        super()._save_checkpoint(trainer, filepath)


def fit(*callbacks, last, **options):
    trainer = quiet_trainer(*callbacks, last, **options)
    asked, broadcast = [], trainer.strategy.broadcast
    trainer.strategy.broadcast = lambda value, src=0: asked.append(trainer.global_step) or broadcast(value, src)
    trainer.fit(job(), DigitsDataModule(batch_size=16))
    return asked


STEPS = 90  # an epoch


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("seconds", "options", "expected"),
    [
        pytest.param(1.0, {}, [90, 180], marks=pytest.mark.slow),  # a minute and a half an epoch
        (1.0, {"minutes": 0.5}, [30, 60, 90, 120, 150, 180]),
        (60.0, {}, [*range(10, 90, 10), 90, *range(100, 180, 10), 180]),
        pytest.param(60.0, {"minutes": None}, [90, 180], marks=pytest.mark.slow),
        (1.0, {"minutes": None, "steps": 40}, [40, 80, 90, 130, 170, 180]),
    ],
)
def test_saves_after_epochs_and_within_long_ones(tmp_path, monkeypatch, seconds, options, expected):
    last = Saved(tmp_path, **options)
    asked = fit(Clock(monkeypatch, seconds), last=last, max_epochs=2, limit_val_batches=0)
    assert last.steps_saved == expected
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 180
    within = [step for step in asked if step % STEPS and step not in expected]
    assert len(within) < 8 * len(expected)  # processes wait for each other a few times between two, not at each step


@pytest.mark.parametrize("options", [{"minutes": 0}, {"minutes": -1.0}, {"steps": 0}, {"minutes": float("nan")}])
def test_intervals_that_are_not_positive_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="must be positive; null for the end of epochs"):
        LastCheckpoint(tmp_path, **options)
