"""Metrics over interruptions."""

import pandas as pd
import pytest

from rld_lightning.runs.metrics import join_metrics, keep_metrics


def log(run, *steps):
    run.mkdir(exist_ok=True)
    pd.DataFrame({"step": steps, "loss": [float(step) for step in steps]}).to_csv(run / "metrics.csv", index=False)


def steps(run):
    return pd.read_csv(run / "metrics.csv")["step"].tolist()


def test_a_run_that_goes_on_elsewhere_begins_with_what_was_logged_before_its_checkpoint(tmp_path):
    log(tmp_path / "first", 1, 2, 3, 4)
    log(tmp_path / "second", 3, 4, 5)
    join_metrics(tmp_path / "second", str(tmp_path / "first" / "last.ckpt"))
    assert steps(tmp_path / "second") == [1, 2, 3, 4, 5]
    assert steps(tmp_path / "first") == [1, 2, 3, 4]


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_goes_on_in_its_own_folder_loses_nothing_however_often(tmp_path, killed):
    resume = str(tmp_path / "last.ckpt")
    log(tmp_path, 1, 2, 3)
    keep_metrics(tmp_path, resume)
    assert not (tmp_path / "metrics.csv").exists()  # which a logger would delete
    log(tmp_path, 3, 4, 5)
    if not killed:  # before it could say so
        join_metrics(tmp_path, resume)
    keep_metrics(tmp_path, resume)
    log(tmp_path, 4, 5, 6)
    join_metrics(tmp_path, resume)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_an_attempt_that_logs_nothing_leaves_what_was_there(tmp_path):
    log(tmp_path, 1, 2)
    keep_metrics(tmp_path, str(tmp_path / "last.ckpt"))
    join_metrics(tmp_path, str(tmp_path / "last.ckpt"))
    assert steps(tmp_path) == [1, 2]
