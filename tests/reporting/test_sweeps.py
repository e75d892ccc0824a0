"""Sweeps: their trials in order, the cells of their heat maps, and Optuna's importances."""

import builtins
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from helpers.run_factory import write_run, write_sweep
from matplotlib.figure import Figure

from rld_lightning.reporting.figures.sensitivity import draw_sensitivity
from rld_lightning.reporting.frame import runs_frame
from rld_lightning.reporting.plots import heat_map_figure, value_scatter
from rld_lightning.reporting.sweeps import MAX_GRID, heat_maps, importances, split_sweeps
from rld_lightning.reporting.tables import sections
from rld_lightning.runs.finished import find_runs


@pytest.fixture
def grid(tmp_path):
    folder = tmp_path / "sweeps" / "grid"
    write_sweep(folder, alphas=(0.5, 1, 2), betas=(4, 8), temperatures=(2, 4), seeds=(0, 1))
    return folder


def test_trials_are_averaged_over_seeds_and_sorted(grid):
    (sweep,), others = split_sweeps(runs_frame(find_runs([grid])))
    assert others.empty  # held out: not in the results tables
    assert sweep.held_out
    assert sweep.keys == ["loss.alpha", "loss.beta", "loss.temperature"]
    trials = sweep.trials
    assert len(trials) == 12
    best = trials.iloc[0]
    assert (best["loss.alpha"], best["loss.beta"], best["loss.temperature"], best["n"]) == (2, 8, 4, 2)
    assert best["mean"] == pytest.approx(58.05)  # 58.0 and 58.1
    assert best["std"] == pytest.approx(0.1 / np.sqrt(2))
    assert best["best"] == pytest.approx(58.15)
    assert trials["mean"].is_monotonic_decreasing


def test_one_heat_map_per_temperature(grid):
    (sweep,), _ = split_sweeps(runs_frame(find_runs([grid])))
    cold, warm = heat_maps(sweep)
    assert (cold.title, warm.title) == ("temperature = 2", "temperature = 4")
    assert (warm.x_key, warm.y_key, *map(list, (warm.cells.columns, warm.cells.index))) == (
        *("loss.alpha", "loss.beta", [0.5, 1, 2], [4, 8]),
    )
    # 58 - |log2(alpha/2)| - 0.7 |log2(beta/8)| - 0.5 |T - 4|, plus 0.05 for the mean of seeds 0 and 1
    expected = np.array([[55.35, 56.35, 57.35], [56.05, 57.05, 58.05]])
    np.testing.assert_allclose(warm.cells, expected)
    np.testing.assert_allclose(cold.cells, expected - 1.0)
    figure = heat_map_figure([cold, warm], sweep, "name")
    assert "55.35" not in figure.caption
    assert "from 54.35 to 58.05" in figure.caption
    texts = [text for panel in figure.panels for text in (">58.05<", ">54.35<") if text in panel.svg()]
    assert texts == [">54.35<", ">58.05<"]


def test_a_missing_trial_is_an_empty_cell(grid):
    for seed in (0, 1):
        (grid / f"loss.alpha=2,loss.beta=8,loss.temperature=4,seed={seed}" / "summary.json").unlink()
    (sweep,), _ = split_sweeps(runs_frame(find_runs([grid])))
    warm = heat_maps(sweep)[1]
    assert np.isnan(warm.cells.iloc[1, 2])
    assert warm.cells.isna().sum().sum() == 1
    assert heat_map_figure(heat_maps(sweep), sweep, "name").panels[1].svg()


def test_a_setting_that_lacks_seeds_is_not_the_best(grid):
    """One lucky seed of alpha 0.5; the other failed."""
    lucky, failed = (grid / f"loss.alpha=0.5,loss.beta=4,loss.temperature=4,seed={seed}" for seed in (0, 1))
    (failed / "summary.json").unlink()
    text = (lucky / "summary.json").read_text()
    (lucky / "summary.json").write_text(re.sub(r'"top1": [\d.]+', '"top1": 60.0', text))
    (sweep,), _ = split_sweeps(runs_frame(find_runs([grid])))
    assert (sweep.trials["mean"].iloc[0], sweep.trials["n"].iloc[0]) == (60.0, 1)
    figure = heat_map_figure(heat_maps(sweep), sweep, "name")
    warm = figure.panels[1]
    assert warm.alt == "Heat map at temperature = 4: best 58.05 % at alpha 2, beta 8."
    axes = Figure().subplots()
    warm.draw(axes)
    bold = [text.get_text() for text in axes.texts if text.get_weight() == "bold"]
    assert (bold, [patch.get_xy() for patch in axes.patches]) == (["58.05"], [(2, 1)])
    assert "60.00\nn = 1" in [text.get_text() for text in axes.texts]
    assert "mean over n = 2 seeds if no other n is given; one colour scale" in figure.caption
    assert "from 54.35 to 60.00. The best cell of these is outlined" in figure.caption
    points = value_scatter(sweep, "name")
    assert "the best setting has 2." in points.panels[0].alt
    assert points.caption.endswith("mean over n = 1 or 2 seeds; the best one in red, of those with n = 2.")
    _, beta, temperature = draw_sensitivity(sweep).axes  # grey lines, but for the best one's
    assert [text.get_text() for text in beta.get_legend().get_texts()] == ["best: alpha=2, temperature=4"]
    assert [text.get_text() for text in temperature.get_legend().get_texts()] == ["best: alpha=2, beta=8"]


def test_a_trial_with_nan_accuracy_is_ignored(grid):
    write_run(
        grid / "diverged", seed=2, top1=float("nan"), best=58.0, held_out=0.1, epochs=10,
        settings={"loss.alpha": 2, "loss.beta": 8, "loss.temperature": 4},
    )  # fmt: skip
    (sweep,), others = split_sweeps(runs_frame(find_runs([grid])))
    best = sweep.trials.iloc[0]
    assert (best["mean"], best["n"]) == (pytest.approx(58.05), 2)
    found, left_out = sections(others)
    assert found == []
    assert [(Path(folder).name, why) for folder, why in left_out] == [("diverged", "its accuracy is not a number")]


@pytest.mark.parametrize("settings", [["recipe.optimizer.lr"], ["recipe.optimizer.lr", "loss.weight"]])
def test_heat_maps_of_one_or_two_keys(tmp_path, settings):
    for i, value in enumerate((0.01, 0.1)):
        for j in (0, 1) if len(settings) > 1 else (0,):
            values = dict(zip(settings, (value, 0.5 + j), strict=False))
            write_run(tmp_path / "sweeps" / "s" / f"{i}{j}", "kd", top1=50 + 10 * i + j, held_out=0.1, settings=values)
    (sweep,), _ = split_sweeps(runs_frame(find_runs([tmp_path])))
    (one,) = heat_maps(sweep)
    if len(settings) == 1:
        np.testing.assert_allclose(one.cells, [[50, 60]])
    else:
        np.testing.assert_allclose(np.sort(one.cells.to_numpy().ravel()), [50, 51, 60, 61])


def test_long_values_with_equal_ends_stay_separate(tmp_path):
    for name, top1 in (("a", 50.0), ("b", 60.0)):
        settings = {"model.teacher.weights": f"/{name}/best/teacher/student.safetensors"}
        write_run(tmp_path / "sweeps" / "s" / name, "kd", top1=top1, held_out=0.1, settings=settings)
    (sweep,), _ = split_sweeps(runs_frame(find_runs([tmp_path])))
    assert list(sweep.trials["mean"]) == [60, 50]


def test_keys_that_vary_together_are_one_key(tmp_path):
    for epochs in (2, 4):
        write_run(tmp_path / "sweeps" / "s" / str(epochs), held_out=0.1, epochs=epochs)
    (sweep,), _ = split_sweeps(runs_frame(find_runs([tmp_path])))
    assert sweep.keys == ["recipe.epochs"]


def test_random_values_form_no_grid(tmp_path):
    for i in range(9):
        values = {"loss.alpha": 1 + 0.1 * i, "loss.beta": 2 + 0.3 * (i * 4 % 9)}
        write_run(tmp_path / "sweeps" / "s" / str(i), top1=50 + i, held_out=0.1, settings=values)
    (sweep,), _ = split_sweeps(runs_frame(find_runs([tmp_path])))
    assert heat_maps(sweep) == []


def test_a_sweep_on_the_test_split_is_in_results_too(tmp_path):
    (tmp_path / "multirun.yaml").write_text("{}")
    for alpha in (1.0, 2.0):
        write_run(tmp_path / str(alpha), settings={"loss.alpha": alpha})
    runs = runs_frame(find_runs([tmp_path]))
    (sweep,), others = split_sweeps(runs)
    assert not sweep.held_out
    assert others["folder"].tolist() == runs["folder"].tolist()


def test_seeds_only_are_no_sweep(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "sweeps" / "s" / str(seed), seed=seed)
    assert split_sweeps(runs_frame(find_runs([tmp_path])))[0] == []


def test_importances_of_a_study(tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{tmp_path}/study.db", sampler=optuna.samplers.RandomSampler(seed=0), direction="maximize"
    )

    def objective(trial):
        alpha, beta = trial.suggest_float("loss.alpha", 0, 4), trial.suggest_float("loss.beta", 0, 4)
        return 50 + 2 * alpha + 0.001 * beta

    study.optimize(objective, n_trials=10)
    before = (tmp_path / "study.db").read_bytes()
    shares, how = importances(tmp_path / "study.db")
    assert list(shares) == ["loss.alpha", "loss.beta"]
    assert shares["loss.alpha"] > 0.5
    assert sum(shares.values()) == pytest.approx(1)
    assert "10 complete trials" in how
    assert (tmp_path / "study.db").read_bytes() == before


@pytest.mark.parametrize(("scale", "words"), [(1.0, "over 6 complete"), (1e200, r"study\.db: they are not finite")])
def test_importances_of_strange_names_and_numbers(tmp_path, scale, words):
    optuna = pytest.importorskip("optuna")
    names = [f"{number}{'x' * 300}" if number else "\x1b[2J$" for number in range(MAX_GRID + 5)]
    space = dict.fromkeys(names, optuna.distributions.FloatDistribution(0, 1))
    sampler, add = optuna.samplers.RandomSampler(seed=0), optuna.trial.create_trial
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", sampler=sampler)
    for number in range(6):
        params = {name: (number * place) % 7 / 7 for place, name in enumerate(names, 1)}
        study.add_trial(add(value=scale * (number > 1), params=params, distributions=space))
    shares, how = importances(tmp_path / "study.db")
    assert re.search(words, how)
    assert len(shares) == (MAX_GRID if scale == 1 else 0)
    assert all(len(key) <= 200 and "\x1b" not in key for key in shares)


def test_a_study_with_an_endless_view_is_not_queried(tmp_path):
    pytest.importorskip("optuna")
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
    with closing(sqlite3.connect(tmp_path / "study.db")) as database:
        database.execute(f"CREATE VIEW studies AS {endless}")
    assert importances(tmp_path / "study.db")[1].endswith("it has 'studies', but Optuna creates only tables")


def test_unreadable_studies_and_missing_optuna_are_explained(tmp_path, monkeypatch):
    (tmp_path / "study.db").write_text("not a database")
    shares, why = importances(tmp_path / "study.db")
    assert shares == {}
    assert why

    def without(name, *args, **kwargs):
        if name == "optuna":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    assert 'pip install "rld-lightning[sweep]"' in importances(tmp_path / "study.db")[1]
