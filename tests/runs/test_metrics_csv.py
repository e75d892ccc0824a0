"""A run's ``metrics.csv``: one row per epoch, written atomically, without foreign formulas."""

from collections import Counter

import pandas as pd
import pytest

from rld_lightning.callbacks import MetricsFile
from rld_lightning.runs import metrics_csv
from rld_lightning.runs.metrics_csv import RowWriter, known_rows, read_metrics, read_rows


def log(logger, epoch, step, **values):
    logger.log_metrics({name.replace("_", "/", 1): value for name, value in values.items()} | {"epoch": epoch}, step)
    logger.save()


def test_one_row_per_epoch_whatever_was_logged_when(tmp_path):
    logger = MetricsFile(tmp_path)
    for epoch in range(3):
        log(logger, epoch, 10 * epoch + 5, loss=9.0)  # of a single step
        logger.log_metrics({"lr-SGD": 0.1}, 10 * epoch)  # of a callback, without an epoch
        log(logger, epoch, 10 * epoch + 9, val_top1=50.0 + epoch)
        log(logger, epoch, 10 * epoch + 9, train_loss=2.0 - epoch)
    logger.finalize("success")
    log(logger, 3, 30, val_top1=60.0)  # a validation after training
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table) == ["epoch", "step", "val/top1", "train/loss"]
    assert table["epoch"].tolist() == [0, 1, 2]
    assert table["step"].tolist() == [9, 19, 29]
    assert table["val/top1"].tolist() == [50.0, 51.0, 60.0]
    assert read_rows(tmp_path) == logger.rows
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_resumed_run_has_each_row_once(tmp_path):
    RowWriter(tmp_path).write([{"epoch": epoch, "step": epoch, "val/top1": 1.0} for epoch in range(4)])
    logger = MetricsFile(tmp_path)
    logger.restore(read_rows(tmp_path)[:2])  # the checkpoint is older than the file
    assert pd.read_csv(tmp_path / "metrics.csv")["epoch"].tolist() == [0, 1]
    log(logger, 2, 2, val_top1=2.0)
    assert pd.read_csv(tmp_path / "metrics.csv")["val/top1"].tolist() == [1.0, 1.0, 2.0]


def test_file_written_row_by_row_is_the_one_written_at_once(tmp_path):
    rows, writer = [], RowWriter(tmp_path)
    for epoch in range(6):
        rows.append({"epoch": epoch, "step": epoch, "val/top1": epoch / 3})
        if epoch % 2:  # some columns begin later, and have gaps
            writer.write(rows)
            rows[-1] |= {"train/loss": float("nan"), "a, b": 1e-9} if epoch > 2 else {"val/top1": -1.0}
        writer.write(rows)
        RowWriter(tmp_path / "at once").write(rows)
        assert (tmp_path / "metrics.csv").read_text() == (tmp_path / "at once" / "metrics.csv").read_text()
    assert list(pd.read_csv(tmp_path / "metrics.csv")) == ["epoch", "step", "val/top1", "train/loss", "a, b"]
    assert pd.read_csv(tmp_path / "metrics.csv")["val/top1"].tolist() == [0, -1, 2 / 3, 1, 4 / 3, 5 / 3]


def test_finished_rows_are_not_formatted_again(tmp_path, monkeypatch):
    formatted, line = Counter(), metrics_csv._line
    monkeypatch.setattr(metrics_csv, "_line", lambda cells: formatted.update(cells[:1]) or line(cells))
    writer, rows = RowWriter(tmp_path), []
    for epoch in range(50):
        rows.append({"epoch": epoch, "step": epoch})
        writer.write(rows)
    assert formatted == {"epoch": 50} | dict.fromkeys(range(49), 2) | {49: 1}, "as the last row, and once more"


def test_only_numbers_are_read_from_a_foreign_file(tmp_path):
    (tmp_path / "metrics.csv").write_text('epoch,val/top1\n0,50\n1,many\n"=1+1",60\n2,70\n1e300,80\n')
    assert read_metrics(tmp_path)["val/top1"].dropna().to_dict() == {1: 50.0, 3: 70.0}
    (tmp_path / "metrics.csv").write_text("epoch,val/top1,val/agreement,val/ce\n0,50,-1,1e9\n1,1e9,20,2\n")
    table = read_metrics(tmp_path)
    assert {name: table[name].dropna().to_dict() for name in table} == {
        "val/top1": {1: 50.0},
        "val/agreement": {2: 20.0},
        "val/ce": {1: 1e9, 2: 2.0},
    }


def test_tables_that_no_run_writes_are_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val/top1\n0,50\n")
    with pytest.raises(ValueError, match=r"metrics\.csv has no column epoch"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.csv").write_text(f"epoch,step\n0,{'1' * 200_000}\n")
    with pytest.raises(ValueError, match=r"metrics\.csv is not a table \(field larger"):
        read_rows(tmp_path)


@pytest.mark.parametrize("content", ["", "epoch,step\n", "\n"])
def test_file_without_rows_is_read(tmp_path, content):
    (tmp_path / "metrics.csv").write_text(content)
    assert read_rows(tmp_path) == []
    assert read_metrics(tmp_path).empty
    assert read_rows(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, []),
        ("rows", []),
        ([{"epoch": 0, "val/top1": 1.5}], [{"epoch": 0, "val/top1": 1.5}]),
        ([{"epoch": 0, "=cmd|x": 1.0, "@sum": 1.0, 3: 4.0, "a": "=1+1", "b": [1]}, {"c": 1.0}, 7], [{"epoch": 0}]),
        ([{"epoch": float("nan")}, {"epoch": "x"}], []),
    ],
)
def test_only_numbers_with_plain_names_are_read_from_a_foreign_checkpoint(values, expected):
    assert known_rows(values) == expected
