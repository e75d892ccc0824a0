"""Figures of results: gains, sensitivity, ablation, and the script."""

import runpy
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from rld_lightning.reporting.figures import list_figures, register_figure
from rld_lightning.reporting.figures.ablation import ablation, ablation_cells, ablation_markdown, draw_ablation
from rld_lightning.reporting.figures.gain import draw_gain, gains, write_gain
from rld_lightning.reporting.figures.sensitivity import draw_sensitivity, find_sweep, write_sensitivity
from rld_lightning.reporting.frame import read_frame
from rld_lightning.reporting.tables import sections

REPOSITORY = Path(__file__).parents[3]


def test_gains_are_paired_differences_over_seeds(make_run, tmp_path):
    for seed, rld, ce in ((0, 60.0, 55.0), (1, 63.0, 56.0), (2, 70.0, None)):
        make_run("rld", seed=seed, top1=rld, teacher_train=(90.0, 92.0))
        if ce:
            make_run("ce", seed=seed, top1=ce)
    make_run("dkd", seed=1, top1=62.5)
    make_run("kd", seed=0, top1=1.0, epochs=99)  # another recipe: not compared
    make_run("rld", teacher="resnet20", seed=0, top1=58.0, teacher_train=(80.0,))
    table, left_out = gains(read_frame([tmp_path / "runs"])[0])
    assert not left_out
    table = table.sort_values(["teacher_top1", "reference"]).reset_index(drop=True)
    assert table["reference"].tolist() == ["ce", "ce", "dkd"]
    assert table["teacher_top1"].tolist() == [80, 91, 91]
    assert table["gain"].tolist() == [3, 6, 0.5]
    assert table["n"].tolist() == [1, 2, 1]
    assert table["low"].isna().all()  # fewer than three seeds
    figure = draw_gain(table, "rld")
    drawn = [container.lines[0].get_xydata()[:, 1].tolist() for container in figure.axes[0].containers]
    assert drawn == [[3, 6], [0.5]]
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["1", "2"]


def test_held_out_images_and_the_test_split_are_separate(make_run, tmp_path):
    for split in ("test", "val"):
        for method in ("rld", "ce"):
            folder = make_run(method, split=split, images=144, split_images=144, val_fraction=0.1).folder
            folder.rename(tmp_path / "runs" / f"{method}-{split}")
    table, _ = gains(read_frame([tmp_path / "runs"])[0])
    assert [pair.split(", ", 2)[2:] for pair in table["pair"]] == [[], ["144 held-out training images (stratified)"]]


def test_bars_are_confidence_intervals(make_run, tmp_path):
    for seed, ahead in enumerate((1.0, 2.0, 6.0)):
        make_run("rld", seed=seed, top1=50.0 + ahead)
        make_run("ce", seed=seed, top1=50.0)
    table, _ = gains(read_frame([tmp_path / "runs"])[0])
    half = stats.t.ppf(0.975, 2) * 7**0.5 / 3**0.5
    assert table[["gain", "low", "high", "n"]].iloc[0].tolist() == pytest.approx([3, 3 - half, 3 + half, 3])
    figure = draw_gain(table, "rld")
    (bar,) = figure.axes[0].containers[0].lines[2][0].get_segments()
    assert bar[:, 1].tolist() == pytest.approx([3 - half, 3 + half])
    assert "95 % confidence interval" in figure.get_supxlabel()


def test_a_pair_without_teacher_accuracy_is_left_out(make_run, tmp_path, capsys):
    make_run("ce", top1=50.0)
    make_run("rld", top1=53.0)
    unwatched = make_run("rld", teacher="resnet20")
    frame = pd.read_csv(unwatched.folder / "metrics.csv").drop(columns="train/teacher_top1")
    frame.to_csv(unwatched.folder / "metrics.csv")
    write_gain(tmp_path / "out", read_frame([tmp_path / "runs"])[0])
    assert pd.read_csv(tmp_path / "out" / "gain.csv")["pair"].tolist() == ["resnet14 \u2192 resnet8, digits"]
    told = " ".join(capsys.readouterr().out.split())
    assert "left out gain: resnet20 \u2192 resnet8, rld: " in told
    assert "has no train/teacher_top1; train it with callbacks.teacher on." in told
    with pytest.raises(ValueError, match=r"no pair can be drawn. resnet20 . resnet8, rld: .* no train/teacher_top1"):
        gains(read_frame([tmp_path / "runs"])[0].query("pair == 'resnet20_to_resnet8' or method == 'ce'"))


def test_points_of_one_teacher_are_side_by_side(make_run, tmp_path):
    for alpha in (1.0, 2.0, 3.0):
        make_run("rld", top1=50 + alpha, loss={"alpha": alpha})
    make_run("ce", top1=50.0)
    make_run("kd", top1=50.5)
    figure = draw_gain(gains(read_frame([tmp_path / "runs"])[0])[0], "rld")
    drawn = [container.lines[0].get_xydata() for container in figure.axes[0].containers]
    places = sorted(float(x) for points in drawn for x, _ in points)
    assert len(places) == len(set(places)) == 6
    assert np.mean(places) == pytest.approx(91)
    assert sorted(float(y) for points in drawn for _, y in points) == [0.5, 1, 1.5, 2, 2.5, 3]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "2", "3"]
    assert "set beside each other" in figure.get_supxlabel()


def test_gains_without_a_comparison_raise(make_run, tmp_path):
    make_run("rld")
    with pytest.raises(ValueError, match="no pair has finished runs of loss=rld and of ce or kd or dkd"):
        gains(read_frame([tmp_path / "runs"])[0])


def sweep(make_run, alphas, betas, seeds):
    for alpha in alphas:
        for beta in betas:
            for seed in seeds:
                make_run("rld", seed=seed, top1=50 + alpha - beta / 10 + seed, loss={"alpha": alpha, "beta": beta})


def test_sensitivity_draws_means_and_deviations(make_run, tmp_path):
    sweep(make_run, (1.0, 2.0), (4.0, 8.0), (0, 2))
    make_run("ce")
    figure = draw_sensitivity(find_sweep(read_frame([tmp_path / "runs"])[0]))
    alpha, beta = figure.axes
    lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in alpha.containers}
    assert lines == {"beta=4": [[1, 51.6], [2, 52.6]], "beta=8": [[1, 51.2], [2, 52.2]]}
    assert [c.lines[0].get_xydata()[0].tolist() for c in beta.containers] == [[4, 51.6], [4, 52.6]]
    bars = alpha.containers[0].lines[2][0].get_segments()[0]
    assert bars[1, 1] - bars[0, 1] == pytest.approx(2 * 2**0.5)


def test_small_values_keep_their_digits(make_run, tmp_path):
    for beta in (2e-5, 4e-5):
        make_run("rld", loss={"beta": beta}, top1=50.123456)
    write_sensitivity(tmp_path, read_frame([tmp_path / "runs"])[0])
    table = pd.read_csv(tmp_path / "sensitivity.csv")
    assert sorted(table["loss.beta"]) == [2e-5, 4e-5]
    assert set(table["mean"]) == {50.1235}


def test_ticks_and_legend_fit_with_sampled_values(make_run, tmp_path, recwarn):
    for number in range(6):
        values = {"alpha": 0.7238517082858716 + number / 97, "beta": 8.98114977751205 - number / 7}
        make_run("rld", loss=values | {"temperature": 4 + number}, top1=50 + number)
    figure = draw_sensitivity(find_sweep(read_frame([tmp_path / "runs"])[0]))
    figure.canvas.draw()
    assert not [warning for warning in recwarn if "constrained_layout" in str(warning.message)]
    for axes in figure.axes:
        panel = axes.get_window_extent()
        assert axes.get_legend().get_window_extent().width < 1.2 * panel.width
        shown = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        shown = sorted((box for box in shown if panel.x0 <= (box.x0 + box.x1) / 2 <= panel.x1), key=lambda box: box.x0)
        assert all(left.x1 < right.x0 for left, right in pairwise(shown))


def test_of_many_settings_all_but_the_best_are_grey(make_run, tmp_path):
    sweep(make_run, (1.0, 2.0), range(1, 6), (0,))
    figure = draw_sensitivity(find_sweep(read_frame([tmp_path / "runs"])[0]))
    alpha, beta = figure.axes
    assert len(alpha.containers) == 5
    figure.canvas.draw()
    for axes in figure.axes:  # the legend covers no curve
        assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0
    assert (alpha.get_xscale(), beta.get_xscale()) == ("log", "linear")
    assert [text.get_text() for text in alpha.get_legend().get_texts()] == ["best: beta=1"]
    assert len(beta.get_legend().get_texts()) == 2


def test_sensitivity_without_a_unique_sweep_raises(make_run, tmp_path):
    make_run("rld", seed=0, loss={"alpha": 1.0})
    make_run("rld", seed=1, loss={"alpha": 1.0})
    with pytest.raises(ValueError, match="no hyper-parameter has several values"):
        find_sweep(read_frame([tmp_path / "runs"])[0])
    make_run("rld", loss={"alpha": 2.0})
    make_run("rld", loss={"alpha": 3.0}, teacher="resnet20")
    make_run("rld", loss={"alpha": 2.0}, teacher="resnet20")
    runs = read_frame([tmp_path / "runs"])[0]
    with pytest.raises(ValueError, match="several things were swept"):
        find_sweep(runs)
    assert set(find_sweep(runs, pair="resnet20_to_resnet8").runs["pair"]) == {"resnet20_to_resnet8"}


def test_the_ablation_separates_our_runs_from_the_papers_numbers(make_run, tmp_path):
    for seed in (0, 1):
        make_run("ce", seed=seed, top1=50.0 + seed)
        make_run("rld_mcd", seed=seed, top1=53.0 + 3 * seed, loss={"alpha": 0.0})
    section = sections(read_frame([tmp_path / "runs"])[0])[0][0]
    rows = ablation(section)
    cells = ablation_cells(rows)
    table = {line[0]: line[1:] for line in cells}
    assert list(table) == ["ce", "rld_scd", "rld_mcd_g", "rld_mcd", "rld_g", "rld"]
    assert table["ce"] == ["", "", "50.50 \u00b1 0.71", "51.50 \u00b1 0.71", "2", "", "72.50"]
    assert table["rld_mcd"] == ["", "M_ge", "54.50 \u00b1 2.12", "55.50 \u00b1 2.12", "2", "+4.00", "75.64"]
    assert table["rld"] == ["\u2713", "M_ge", "-", "-", "-", "-", "76.64"]
    text = ablation_markdown(rows, "t")
    assert text.count("\n|") == 8
    assert "Not ours: the paper's column, resnet32x4" in text
    assert "SECOND-HAND" in text
    drawn = draw_ablation(rows, "t").axes[0].tables[0]
    assert [drawn[line + 1, 3].get_text().get_text() for line in range(6)] == [line[3] for line in cells]
    assert [line for line in range(1, 7) if drawn[line, 3].get_text().get_fontweight() == "bold"] == [4]
    assert [line for line in range(1, 7) if drawn[line, 7].get_text().get_fontweight() == "bold"] == [6]


def test_the_ablation_reads_parts_from_settings(make_run, tmp_path):
    for top1, loss in ((60.0, {"alpha": 1.0}), (61.0, {"alpha": 4.0}), (62.0, {"beta": 1.0}), (63.0, {"mask": "g"}),
                       (64.0, {"alpha": 0.0, "mask": "g"}), (65.0, {"beta": 0.0, "temperature": 2.0})):  # fmt: skip
        make_run("rld", top1=top1, loss={"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "mask": "ge"} | loss)
    rows = ablation(sections(read_frame([tmp_path / "runs"])[0])[0][0])
    rows = rows.astype(object).where(rows.notna(), None)
    table = [(row.scd, row.mask, row.top1_last_mean, row.paper) for row in rows.itertuples()]
    assert table == [
        (False, "", None, 72.5),
        (True, "", None, 73.55),  # for T = 4, unlike ours
        (True, "", 65.0, None),
        (False, "M_g", 64.0, 75.5),
        (False, "M_ge", None, 75.64),
        (True, "M_g", 63.0, 75.53),
        (True, "M_ge", 60.0, 76.64),
        (True, "M_ge", 62.0, None),
        (True, "M_ge", 61.0, None),
    ]


@pytest.fixture
def figures(monkeypatch, capsys):
    """Runs ``scripts/figures.py`` in this process; returns its exit code and output."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(REPOSITORY / "scripts" / "figures.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        told = capsys.readouterr()
        return code, " ".join((told.out + told.err).split())

    return run


@pytest.mark.slow
def test_the_script_writes_files_and_reports_missing_figures(make_run, tmp_path, figures):
    make_run("rld", top1=60.0)
    make_run("ce", top1=50.0)
    code, told = figures("all", tmp_path / "runs", "--out", tmp_path / "out")
    assert code == 0
    names = {f"{name}.{kind}" for name in ("toy", "gain", "ablation") for kind in ("png", "pdf")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"gain.csv", "ablation.md"}
    for name in (
        "explain: the teacher's weights are not at",
        "differences: there is no finished run",
        "sensitivity: no hyper-",
    ):
        assert name in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gain", "nowhere"], "nowhere is not a folder"),
        (["explain", "--index", "1"], "add --run FOLDER"),
        (["explain", "--run", "nowhere"], "nowhere is not the directory of a finished run"),
        (["scatter"], "invalid choice"),
    ],
)
def test_mistakes_end_in_one_sentence(figures, tmp_path, arguments, sentence):
    code, told = figures(*arguments, "--out", tmp_path)
    assert code == 2
    assert sentence in told
    assert not list(tmp_path.iterdir())


def test_a_registered_figure_is_a_command(figures, tmp_path, monkeypatch):
    names = [figure.name for figure in list_figures()]
    assert names == ["ablation", "differences", "explain", "gain", "sensitivity", "toy"]
    with pytest.raises(ValueError, match="'gain' is already registered, by rld_lightning"):
        register_figure("gain", "again")(write_gain)
    registered = {figure.name: figure for figure in list_figures()}
    monkeypatch.setattr("rld_lightning.reporting.figures._FIGURES", registered)

    @register_figure("scatter", "of points", lambda command: command.add_argument("--size", type=int))
    def write_scatter(out, *, size):
        """Writes points."""
        return [out / f"scatter-{size}.png"]

    assert figures("scatter", "--size", "3", "--out", tmp_path) == (0, f"{tmp_path}/scatter-3.png")


def test_a_bad_folder_is_named_and_skipped(make_run, tmp_path, figures):
    make_run("rld", top1=60.0)
    make_run("ce", top1=50.0)
    (make_run("kd").folder / "config.yaml").write_text("")
    code, told = figures("gain", tmp_path / "runs")
    assert code == 0
    assert "config.yaml is not the configuration of a run" in told
    # Written into the runs' folder, where other figures stay; links in an untrusted folder are not followed out of it.
    assert f"{tmp_path}/runs/figures/gain.png" in told
    files = tmp_path / "runs" / "figures"
    (tmp_path / "mine").write_text("mine")
    (files / "gain.csv").unlink()
    (files / "gain.csv").symlink_to(tmp_path / "mine")
    assert "out of the folder, where nothing is written" in figures("gain", tmp_path / "runs")[1]
    shutil.rmtree(files)
    files.symlink_to(tmp_path)
    assert "give --out yourself" in figures("gain", tmp_path / "runs")[1]
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("figure", ["ablation", "differences", "explain", "all"])
def test_no_code_named_in_a_run_directory_is_run(make_run, save_networks, tmp_path, figures, figure):
    marker = tmp_path / "marker"
    for method in ("dkd", "rld"):
        run = make_run(method)
        save_networks(run)
        config = yaml.safe_load((run.folder / "config.yaml").read_text())
        config["data"] = {"_target_": "os.system", "command": f"touch {marker}"}
        config["loss"] = {"_target_": "evil.RLDLoss"}
        (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    place = ["--run", run.folder] if figure == "explain" else [tmp_path / "runs"]
    code, told = figures(figure, *place, "--out", tmp_path / "out")
    assert code == (0 if figure == "all" else 2)
    assert "nothing was run" in told
    assert not marker.exists()
