"""The table of runs, averages over seeds, and CSV files without formulas."""

import math
import os

import pandas as pd
import pytest
from helpers.run_factory import write_run, write_sweep

from rld_lightning.reporting.frame import RUN_COLUMNS, pool_seeds, runs_frame, write_csv
from rld_lightning.reporting.sweeps import best_setting, sweep_settings
from rld_lightning.runs.finished import find_runs


def test_the_frame_has_one_line_per_run(tmp_path):
    write_run(tmp_path / "a", "ce", seed=1, top1=50.0)
    write_run(tmp_path / "b", "rld", top1=60.0, settings={"loss.alpha": 2.0})
    frame = runs_frame(find_runs([tmp_path]))
    assert set(RUN_COLUMNS) <= set(frame)
    assert frame["method"].tolist() == ["ce", "rld"]
    assert frame["top1_last"].tolist() == [50.0, 60.0]
    assert frame["teacher"].isna().tolist() == [True, False]
    assert frame["pair_teacher"].tolist() == ["resnet20"] * 2
    assert frame["overrides"].str.endswith("loss.alpha=2.0").tolist() == [False, True]


def test_seeds_are_averaged_and_sorted_best_first(tmp_path):
    for alpha, top1 in ((1.0, 50.0), (2.0, 60.0)):
        for seed in (0, 1):
            write_run(tmp_path / f"{alpha}-{seed}", seed=seed, top1=top1 + seed, settings={"loss.alpha": alpha})
    table = pool_seeds(runs_frame(find_runs([tmp_path])), ["setting"])
    assert table["mean"].tolist() == [60.5, 50.5]
    assert table["std"].tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert table["best"].tolist() == pytest.approx([60.6, 50.6])
    assert table["n"].tolist() == [2, 2]


def test_a_repeated_seed_counts_once(tmp_path):
    """Optuna may try the same values twice: two equal runs of one seed are no mean of two."""
    for folder, seed, top1 in (("first", 0, 50.0), ("again", 0, 54.0), ("other", 1, 58.0)):
        run = write_run(tmp_path / folder, seed=seed, top1=top1)
        os.utime(run / "summary.json", (seed, {"first": 1, "again": 2, "other": 0}[folder]))
    (pooled,) = pool_seeds(runs_frame(find_runs([tmp_path])), ["setting"]).itertuples()
    assert (pooled.mean, pooled.n, pooled.std) == (56.0, 2, pytest.approx(math.sqrt((4 + 4) / 1)))


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([(60.0, 3, True), (61.0, 3, True)], 1),
        ([(62.0, 1, True), (61.0, 3, True)], 1),  # two of its seeds have failed
        ([(62.0, 3, False), (61.0, 2, True)], 1),  # trained in part
        ([(62.0, 3, False), (61.0, 3, False)], 0),
    ],
)
def test_best_setting_was_trained_to_the_end_with_all_seeds(rows, best):
    assert best_setting(pd.DataFrame(rows, columns=["mean", "n", "complete"])) == best


def test_settings_of_a_sweep_keep_their_text(tmp_path):
    write_sweep(tmp_path, alphas=(1, 2), betas=(8,), temperatures=(4,), seeds=(0, 1))
    write_run(tmp_path / "teacher", "ce", top1=99.0)
    write_run(tmp_path / "diverged", top1=math.nan, settings={"loss.alpha": 2, "loss.beta": 8})
    trials = find_runs([tmp_path])
    table = sweep_settings(trials, ["loss.beta", "loss.alpha", "seed"])
    assert table["overrides"].tolist() == [("loss.beta=8", "loss.alpha=2"), ("loss.beta=8", "loss.alpha=1")]
    assert table["mean"].tolist() == pytest.approx([58.05, 57.05])
    assert table["n"].tolist() == [2, 2]
    assert table["run"].iloc[0].config["loss"]["alpha"] == 2
    (all_seeds,) = sweep_settings(trials, ["seed"]).itertuples()
    assert (all_seeds.overrides, all_seeds.n) == ((), 2)
    assert sweep_settings(trials, ["data.subset"]).empty


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1+cmd", "-2+3", "@SUM(A1)", "\t=1"])
def test_csv_texts_are_not_formulas(tmp_path, text):
    table = pd.DataFrame({"text": [text, "-", "-1.5", "a\r=1"], "number": [-1.0, -2.0, 3.0, float("nan")]})
    read = pd.read_csv(write_csv(table, tmp_path / "t.csv"), dtype={"text": str})
    assert read["text"].tolist() == [f"'{text}", "-", "-1.5", "a =1"]
    assert read["number"].tolist()[:3] == [-1.0, -2.0, 3.0]
