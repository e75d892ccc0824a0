"""Figures of results: gains, sensitivity, ablation, and the script."""

import runpy
import sys
from pathlib import Path

import pytest

from rld_lightning.reporting import find_runs
from rld_lightning.reporting.figures.ablation import ablation, ablation_cells, ablation_markdown, draw_ablation
from rld_lightning.reporting.figures.gain import draw_gain, gains
from rld_lightning.reporting.figures.sensitivity import draw_sensitivity, swept
from rld_lightning.reporting.tables import sections

REPOSITORY = Path(__file__).parents[3]


def test_gains_are_differences_seed_by_seed(make_run, tmp_path):
    for seed, rld, ce in ((0, 60.0, 55.0), (1, 63.0, 56.0), (2, 70.0, None)):
        make_run("rld", seed=seed, top1=rld, teacher_train=(90.0, 92.0))
        if ce:
            make_run("ce", seed=seed, top1=ce)
    make_run("dkd", seed=1, top1=62.5)
    make_run("kd", seed=0, top1=1.0, epochs=99)  # another recipe: not to be compared
    make_run("rld", teacher="resnet20", seed=0, top1=58.0, teacher_train=(80.0,))
    table = gains(find_runs([tmp_path / "runs"])).sort_values(["teacher_top1", "reference"]).reset_index(drop=True)
    assert table["reference"].tolist() == ["ce", "ce", "dkd"]
    assert table["teacher_top1"].tolist() == [80, 91, 91]
    assert table["gain"].tolist() == [3, 6, 0.5]
    assert table["n"].tolist() == [1, 2, 1]
    assert table["std"][1] == pytest.approx(2**0.5)
    figure = draw_gain(table, "rld")
    drawn = [container.lines[0].get_xydata()[:, 1].tolist() for container in figure.axes[0].containers]
    assert drawn == [[3, 6], [0.5]]
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["1", "2"]


def test_nothing_to_compare_is_said(make_run, tmp_path):
    make_run("rld")
    with pytest.raises(ValueError, match="no pair has finished runs of loss=rld and of ce or kd or dkd"):
        gains(find_runs([tmp_path / "runs"]))


def sweep(make_run, alphas, betas, seeds):
    for alpha in alphas:
        for beta in betas:
            for seed in seeds:
                make_run("rld", seed=seed, top1=50 + alpha - beta / 10 + seed, loss={"alpha": alpha, "beta": beta})


def test_sensitivity_draws_means_and_deviations(make_run, tmp_path):
    sweep(make_run, (1.0, 2.0), (4.0, 8.0), (0, 2))
    make_run("ce")
    figure = draw_sensitivity(swept(find_runs([tmp_path / "runs"])))
    alpha, beta = figure.axes
    lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in alpha.containers}
    assert lines == {"beta=4": [[1, 51.6], [2, 52.6]], "beta=8": [[1, 51.2], [2, 52.2]]}
    assert [c.lines[0].get_xydata()[0].tolist() for c in beta.containers] == [[4, 51.6], [4, 52.6]]
    bars = alpha.containers[0].lines[2][0].get_segments()[0]
    assert bars[1, 1] - bars[0, 1] == pytest.approx(2 * 2**0.5)


def test_many_settings_are_grey_but_the_best(make_run, tmp_path):
    sweep(make_run, (1.0, 2.0), range(1, 10), (0,))
    alpha, beta = draw_sensitivity(swept(find_runs([tmp_path / "runs"]))).axes
    assert len(alpha.containers) == 9
    assert [text.get_text() for text in alpha.get_legend().get_texts()] == ["best: beta=1"]
    assert len(beta.get_legend().get_texts()) == 2


def test_what_was_not_swept_is_said(make_run, tmp_path):
    make_run("rld", seed=0, loss={"alpha": 1.0})
    make_run("rld", seed=1, loss={"alpha": 1.0})
    with pytest.raises(ValueError, match="no hyper-parameter has several values"):
        swept(find_runs([tmp_path / "runs"]))
    make_run("rld", loss={"alpha": 2.0})
    make_run("rld", loss={"alpha": 3.0}, teacher="resnet20")
    make_run("rld", loss={"alpha": 2.0}, teacher="resnet20")
    runs = find_runs([tmp_path / "runs"])
    with pytest.raises(ValueError, match="several things were swept"):
        swept(runs)
    assert {run.pair for run in swept(runs, pair="resnet20_to_resnet8").runs} == {"resnet20_to_resnet8"}


def test_ablation_has_our_runs_and_the_papers_numbers_apart(make_run, tmp_path):
    for seed in (0, 1):
        make_run("ce", seed=seed, top1=50.0 + seed)
        make_run("rld_mcd", seed=seed, top1=53.0 + 3 * seed, loss={"alpha": 0.0})
    section = sections(find_runs([tmp_path / "runs"]))[0][0]
    rows = ablation(section)
    _, cells = ablation_cells(rows)
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


@pytest.fixture
def figures(monkeypatch, capsys):
    """Runs ``scripts/figures.py`` in this process: exit code and what it prints."""

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


def test_the_script_leaves_files_and_says_what_is_missing(make_run, tmp_path, figures):
    make_run("rld", top1=60.0)
    make_run("ce", top1=50.0)
    code, told = figures("all", tmp_path / "runs", "--out", tmp_path / "out")
    assert code == 0
    names = {f"{name}.{kind}" for name in ("toy", "gain", "ablation") for kind in ("png", "pdf")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"gain.csv", "ablation.md"}
    for name in ("explain: there are no weights", "differences: there is no finished run", "sensitivity: no hyper-"):
        assert name in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gain", "nowhere"], "nowhere is not a folder"),
        (["explain", "--index", "1"], "add --run FOLDER"),
        (["explain", "--run", "nowhere"], "nowhere is not the folder of a finished run"),
        (["toy", "--temperature", "0"], "temperature=0.0 is not allowed"),
        (["toy", "--eta", "3"], "eta=3.0 is not allowed"),
        (["scatter"], "invalid choice"),
    ],
)
def test_a_mistake_ends_in_one_sentence(figures, tmp_path, arguments, sentence):
    code, told = figures(*arguments, "--out", tmp_path)
    assert code == 2
    assert sentence in told
    assert not list(tmp_path.iterdir())
