"""``metrics.csv`` within an epoch and at its end."""

import pytest

from rld_lightning.callbacks import MetricsFile, metrics_file
from rld_lightning.runs.metrics_csv import read_rows


@pytest.mark.parametrize(("seconds", "waits"), [(10.0, True), (0.0, False)])
def test_row_after_validation_is_delayed_only_if_the_epoch_ends_soon(tmp_path, monkeypatch, seconds, waits):
    monkeypatch.setattr(metrics_file, "_SECONDS", seconds)
    logger = MetricsFile(tmp_path)

    def log(step, **values):
        logger.log_metrics({name.replace("_", "/"): value for name, value in values.items()}, step)
        logger.save()
        return read_rows(tmp_path)

    first = log(3, epoch=0, val_top1=1.0)
    assert first == [{"epoch": 0, "step": 3, "val/top1": 1.0}]
    whole = log(3, epoch=0, train_loss=2.0)
    assert whole == [{**first[0], "train/loss": 2.0}]
    second = {"epoch": 1, "step": 6, "val/top1": 3.0}
    assert log(6, epoch=1, val_top1=3.0) == (whole if waits else [*whole, second])
    assert log(6, epoch=1, train_loss=4.0) == [*whole, {**second, "train/loss": 4.0}]
    log(9, epoch=2, val_top1=5.0)
    logger.finalize("success")
    assert read_rows(tmp_path)[-1] == {"epoch": 2, "step": 9, "val/top1": 5.0}
