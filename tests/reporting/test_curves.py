"""Learning curves from a metrics file."""

import pandas as pd
import pytest
from helpers.run_factory import write_run
from matplotlib.figure import Figure

from rld_lightning.reporting.curves import plot_curves
from rld_lightning.reporting.style import page_svg, write_figure
from rld_lightning.runs.metrics_csv import read_metrics
from rld_lightning.runs.summary import read_summary

METRICS = """epoch,step,loss,lr-SGD,train/loss,train/ce,train/kd,stats/teacher_wrong,val/ce,val/top1,val/top5,\
stats/ce_share,stats/kd_share,train/grad_norm,train/top1_teacher_wrong,val/top1_teacher_wrong
,0,,0.05,,,,,,,,,,,,
0,9,3.5,,,,,,,,,,,,,
0,10,,,,,,,2.0,40.0,80.0,,,,,12.0
0,10,,,3.0,2.0,1.0,30.0,,,,60.0,40.0,1.5,11.0,
,11,,0.005,,,,,,,,,,,,
1,20,,,,,,,1.5,50.0,90.0,,,,,14.0
1,20,,,2.0,1.5,0.5,20.0,,,,70.0,30.0,0.5,13.0,
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    return tmp_path


def test_metrics_have_one_row_per_epoch_from_one(run):
    metrics = read_metrics(run)
    assert metrics.index.tolist() == [1, 2]
    assert metrics["val/top1"].tolist() == [40.0, 50.0]
    assert metrics["train/kd"].tolist() == [1.0, 0.5]
    assert "loss" not in metrics


def test_characters_that_the_font_lacks_give_no_warning(tmp_path, recwarn):
    (figure := Figure()).suptitle("\N{CJK UNIFIED IDEOGRAPH-732B}\r\x1b[31m")  # it would be printed as it is
    write_figure(figure, tmp_path / "a.png", dpi=20)
    assert page_svg(lambda: figure).startswith("<svg")
    assert [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)] == []


def test_the_figure_has_each_term_and_the_schedule(run, monkeypatch):
    drawn = {}

    def keep(figure, path, **_options):
        for axes in figure.axes:
            drawn[axes.get_title()] = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        save(figure, path)

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", keep)
    path = plot_curves(run, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert drawn["Student accuracy"]["val top-1"] == [40.0, 50.0]
    assert drawn["Loss terms (weighted) and validation cross-entropy"] == {
        "sum": [3.0, 2.0],
        "ce": [2.0, 1.5],
        "kd": [1.0, 0.5],
        "val ce": [2.0, 1.5],
    }
    assert drawn["Share of each term in the loss"] == {"ce": [60.0, 70.0], "kd": [40.0, 30.0]}
    assert drawn["Teacher and statistics of the loss"] == {
        "student right where teacher is wrong, val": [12.0, 14.0],
        "teacher wrong, train": [30.0, 20.0],
    }
    assert drawn["Gradient norm, before clipping"] == {"mean over the epoch": [1.5, 0.5]}
    assert drawn["Learning rate"] == {"lr-SGD": [0.05, 0.005]}


def drawn_on(monkeypatch, run):
    """The x positions of the points of ``val/top1``, and the visible ticks."""
    drawn = []

    def keep(figure, path, **options):
        save(figure, path, **options)
        axes = figure.axes[0]
        low, high = axes.get_xlim()
        ticks = [float(tick) for tick in axes.get_xticks() if low <= tick <= high]
        drawn.append((list({line.get_label(): line for line in axes.lines}["val top-1"].get_xdata()), ticks))

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", keep)
    plot_curves(run, "title", read_summary(run))
    return drawn[0]


# Lightning's log when max_steps=60 ends the first epoch of 782 steps, and the run is validated afterwards.
IN_PART = """epoch,step,train/loss,train/ce,val/top1
0,59,3.0,3.0,
1,60,,,12.5
"""


def test_a_partial_epoch_is_drawn_at_its_fraction(tmp_path, monkeypatch):
    write_run(tmp_path, epochs=240, summary={"steps": 60, "scheduled_steps": 782 * 240, "epochs": 1})
    (tmp_path / "metrics.csv").write_text(IN_PART)
    places, ticks = drawn_on(monkeypatch, tmp_path)
    assert places == [pytest.approx(60 / 782)]
    assert ticks == [0, 1]


@pytest.mark.parametrize("summary", [{}, {"steps": 782 * 2, "scheduled_steps": 782 * 2}])
def test_ticks_are_at_whole_epochs_from_one(tmp_path, monkeypatch, summary):
    write_run(tmp_path, epochs=2, summary=summary)
    lines = ["epoch,step,val/top1", "0,781,40.0", "1,1563,50.0"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    assert drawn_on(monkeypatch, tmp_path) == ([1, 2], [1, 2])


def test_a_single_epoch_has_whole_ticks(tmp_path, monkeypatch):
    write_run(tmp_path, epochs=2)
    (tmp_path / "metrics.csv").write_text("epoch,step,val/top1\n1,1563,40.0\n")
    assert drawn_on(monkeypatch, tmp_path) == ([2], [1, 2])


def test_metrics_without_epochs_are_empty(tmp_path):
    pd.DataFrame({"epoch": [], "step": [], "val/top1": []}).to_csv(tmp_path / "metrics.csv", index=False)
    assert read_metrics(tmp_path).empty


@pytest.mark.parametrize(
    ("interval", "steps", "style"), [("epoch", [0, 9, 19], "steps-pre"), ("step", [9, 19], "default")]
)
def test_the_learning_rate_is_drawn_over_its_epoch(tmp_path, monkeypatch, interval, steps, style):
    write_run(tmp_path, epochs=2, settings={"recipe.scheduler_interval": interval})
    (tmp_path / "metrics.csv").write_text("epoch,step,val/top1,lr\n0,9,40,0.05\n1,19,50,0.005\n")
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: found.extend(figure.axes[-1].lines))
    plot_curves(tmp_path, "title")
    (line,) = found
    assert (list(line.get_xdata()), line.get_drawstyle()) == (steps, style)
    assert list(line.get_ydata())[-2:] == [0.05, 0.005]


@pytest.mark.parametrize(("teacher_top1", "drawn"), [(99.81, False), (99.79, True)])
def test_percentages_of_few_images_are_not_drawn(tmp_path, monkeypatch, teacher_top1, drawn):
    run, labels = write_run(tmp_path / "run", "kd", teacher_top1=teacher_top1), set()
    (run / "metrics.csv").write_text(METRICS)
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *_, **__: labels.update(line.get_label() for a in figure.axes for line in a.lines),
    )
    summary = read_summary(run)
    plot_curves(run, "title", summary)
    assert round(summary.images * (100 - teacher_top1) / 100) in (19, 21)
    assert ("student right where teacher is wrong, val" in labels) == drawn


def test_only_what_was_logged_has_a_panel(tmp_path, monkeypatch):
    write_run(tmp_path)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    for lines in (["0,9,1.0,1.0,2.0,40"], []):
        text = "\n".join(["epoch,step,train/loss,train/ce,val/ce,val/top1", *lines])
        (tmp_path / "metrics.csv").write_text(text + "\n")
        plot_curves(tmp_path, "title")
    drawn, empty = ({axes.get_title(): [line.get_label() for line in axes.lines] for axes in f.axes} for f in figures)
    assert drawn == {
        "Student accuracy": ["val top-1"],
        "Loss terms (weighted) and validation cross-entropy": ["ce", "val ce"],
    }
    assert empty == {"Student accuracy": []}
