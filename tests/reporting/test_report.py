"""The report as a whole: its contents, and its robustness against bad input."""

import json
import os
import re
import runpy
import sys
from html import escape as escape_html
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
import yaml
from helpers.run_factory import write_comparison, write_run, write_sweep
from matplotlib.figure import Figure

from rld_lightning.reporting.confusion import confusion_figure
from rld_lightning.reporting.frame import runs_frame
from rld_lightning.reporting.known_cost import Cost
from rld_lightning.reporting.latex import escape
from rld_lightning.reporting.plots import cost_scatter
from rld_lightning.reporting.report import write_report
from rld_lightning.reporting.style import FigureOfPanels, Panel
from rld_lightning.reporting.tables import sections
from rld_lightning.runs.finished import find_runs
from rld_lightning.tasks.cost import measure_cost

REPOSITORY = Path(__file__).parents[2]

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Tables(HTMLParser):
    """Collects the texts of table rows and checks that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and "svg" not in self.open]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def parse(path):
    page = Tables()
    page.feed(path.read_text())
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    return page


@pytest.mark.parametrize(("label", "most"), [("ce", 4), ("rld (subset=0.3, epochs=2)", 2), ("rld " * 40, 1)])
def test_legend_fits_its_figure(drawn, tmp_path, monkeypatch, label, most):
    figures = []
    monkeypatch.setattr("rld_lightning.reporting.style.write_figure", lambda figure, *_, **__: figures.append(figure))
    panel = Panel("title", "alt", lambda axes: axes.plot([1, 2]))
    FigureOfPanels("name", "caption", (panel,), tuple((f"{label} {n}", "red", "-") for n in range(7))).write(tmp_path)
    (figure,) = figures
    figure.draw_without_rendering()
    (legend,) = figure.legends
    whole, own, axes = figure.bbox, legend.get_window_extent(), figure.axes[0].get_window_extent()
    assert whole.x0 <= own.x0 < own.x1 <= whole.x1
    assert whole.y0 <= own.y0 < own.y1 < axes.y0
    assert legend._ncols == most
    assert axes.height > 0.6 * panel.size[1] * figure.dpi, "it makes the figure higher, not the panel lower"
    assert [text.get_text().replace("\n", " ") for text in legend.get_texts()] == [f"{label} {n}" for n in range(7)]


def write_confusion(folder, rows):
    lines = [f"{a},{b},{count}" for a, b, count in rows]
    (folder / "confusion.csv").write_text("\n".join(["class,predicted,images", *lines]))


@pytest.fixture
def drawn():
    """Requested by tests that need real figures."""


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch):
    """Skips drawing, which takes nearly all of a report's time: most tests read only texts and numbers."""
    if "drawn" not in request.fixturenames:
        svg = '<svg role="img" aria-label="{}"></svg>'
        monkeypatch.setattr(Panel, "svg", lambda panel: svg.format(escape_html(panel.alt)))
        monkeypatch.setattr(FigureOfPanels, "write", lambda figure, folder, kinds: [])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    runs = root / "runs"
    write_comparison(
        runs / "pair", {"ce": 73.2, "kd": 74.9, "rld": 76.0}, 3,
        teacher="wrn40_2", student="wrn16_2", epochs=240, teacher_top1=75.6,
        summary={"seconds": 4_260.0},
    )  # fmt: skip
    for seed in range(2):
        write_confusion(
            runs / "pair" / "rld" / f"seed{seed}", [("cat", "cat", 8), ("cat", "<b>dog", 2), ("<b>dog", "<b>dog", 5)]
        )
    (runs / "pair" / "rld" / "seed2" / "confusion.csv").write_text("class,predicted,images\ncat,cat,many")
    for seed, address in enumerate(("https://wandb.ai/me/p/runs/a", "javascript:alert(1)", 'https://a.b/" onclick=x')):
        (runs / "pair" / "kd" / f"seed{seed}" / "wandb_run.json").write_text(json.dumps({"url": address}))
    write_comparison(runs / "quick", {"rld": 70.0}, 2, teacher="wrn40_2", student="wrn16_2", with_teacher=False)
    write_sweep(runs / "sweeps" / "grid", alphas=(1, 2), betas=(4, 8), temperatures=(4,))
    write_run(runs / "sweeps" / "grid" / "bad", error="training diverged in <epoch> 3", held_out=0.1)
    write_run(runs / "interrupted", finished=False)
    return write_report([runs], root / "out", title="Title & more", latex=True, pictures=["svg"])


def test_the_spread_of_a_sweep_is_explained_also_without_results(tmp_path):
    write_sweep(tmp_path / "sweeps" / "s", alphas=(1, 2), betas=(8,), temperatures=(4,), seeds=(0, 1))
    files = write_report([tmp_path], tmp_path / "out")
    for page in (files.markdown, files.html):
        text = page.read_text()
        assert "±" in text.split("mean ± standard deviation over n seeds")[1]


def test_the_results_table(report):
    rows = {row[0]: row for row in parse(report.html).rows}
    results = pd.read_csv(report.html.parent / "results.csv").set_index("method")
    rld = results.loc["rld (epochs=240)"]
    cells = rows["rld (epochs=240)"]
    assert cells[1] == f"{rld['last_mean']:.2f} ± {rld['last_std']:.2f}"
    assert cells[3:6] == ["240", "3seeds 0-2", "90071 min"]  # images/s and duration
    assert cells[-1].startswith("76.02")  # the paper's, second-hand, with unknown alpha and beta
    assert {"†", "‡"} <= set(cells[-1])
    assert rows["kd"][-1].startswith("74.92")
    assert "‡" not in rows["kd"][-1]
    assert "‡" in rows["rld (epochs=30)"][-1]  # trained differently
    assert rld["published_second_hand"] in (True, "True")
    assert "iversonshao/DSKD" in rld["published_source"]
    assert rows["cestudent alone"][4] == "3seeds 0-2"
    assert rows["wrn40_2, ceteacher"][1] == "68.20"  # trained in the folder of the weights
    assert rows["wrn40_2, pair/teacher/student.safetensorsteacher, as measured in these runs"][1] == "75.60"


@pytest.mark.parametrize(("own", "listed"), [(91.7, ["resnet20, ce"]), (90.0, ["resnet20, ce", "resnet20"])])
def test_a_teacher_is_listed_once_if_its_run_has_the_accuracy_that_its_students_measured(tmp_path, own, listed):
    write_run(tmp_path / "kd" / "teacher", "ce", student="resnet20", teacher=None, top1=own)
    write_run(tmp_path / "kd", "kd", student="resnet8", teacher="resnet20", top1=60.0, teacher_top1=91.7)
    files = write_report([tmp_path], tmp_path / "out")
    results = pd.read_csv(files.html.parent / "results.csv")
    assert results.loc[results["role"] == "teacher", "method"].tolist() == listed


def test_gains_and_tests_equal_those_of_the_runs(report):
    runs = pd.read_csv(report.html.parent / "runs.csv")
    runs = runs[(runs["epochs"] == 240) & (runs["pair"] == "wrn40_2_to_wrn16_2")]
    top1 = runs.pivot_table(index="seed", columns="method", values="top1_last")
    results = pd.read_csv(report.html.parent / "results.csv").set_index("method")
    gain = (top1["rld"] - top1["kd"]).mean()
    assert results.loc["rld (epochs=240)", "last_over_kd"] == pytest.approx(gain)
    comparisons = pd.read_csv(report.html.parent / "comparisons.csv")
    assert set(comparisons["epoch"]) == {"last", "best"}
    row = comparisons.query("epoch == 'last' and first == 'rld (epochs=240)' and second == 'kd'").iloc[0]
    assert row["difference"] == pytest.approx(gain)
    assert row["p_holm"] >= row["p"]


def test_confusions_pool_the_seeds_that_recorded_them(report):
    assert "2 seeds together" in report.html.read_text()  # of three, one is damaged


def test_a_sweep_is_not_in_the_results(report):
    results = pd.read_csv(report.html.parent / "results.csv")
    assert set(results["split"]) == {"the test split"}
    assert len(pd.read_csv(report.html.parent / "sweeps.csv")) == 4
    text = report.html.read_text()
    assert "Not the test split." in text
    assert "58.00" in text


def test_failed_and_unfinished_runs_are_listed(report):
    page = report.html.read_text()
    assert "training diverged in &lt;epoch&gt; 3" in page
    assert "running or interrupted" in page
    assert "1 failed or unfinished" in page


def test_unknown_environment_values_are_omitted(report):
    page = report.html.read_text()
    assert "platform Linux-x86_64 · threads 1 · gpus none</p>" in page


def test_the_page_is_self_contained(report):
    page = report.html.read_text()
    assert "<title>Title &amp; more</title>" in page
    assert not re.search(r"(src|href)=\"(?!#)", page.split("<main>")[0])
    assert "@import" not in page
    svgs = re.findall(r"<svg[^>]*>", page)
    assert len(svgs) >= 4
    assert all('role="img" aria-label="' in svg for svg in svgs)
    assert 'content="width=device-width' in page


def test_the_page_has_the_exact_commands(report):
    assert "python scripts/fit.py model=wrn40_2_to_wrn16_2 loss=rld seed=1 recipe.epochs=240" in report.html.read_text()


def test_markdown_has_the_same_contents_and_the_figures(report):
    text = report.markdown.read_text()
    assert "76.02<sup>" in text
    pictures = re.findall(r"\]\((figures/[^)]+\.png)\)", text)
    assert {f"{Path(picture).stem}.{kind}" for picture in pictures for kind in ("png", "svg")} == {
        path.name for path in report.figures
    }
    for picture in pictures:
        assert (report.markdown.parent / picture).read_bytes().startswith(b"\x89PNG")
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert tables
    for table in tables:
        bare = [re.sub(r"\\\|", "", line) for line in table.splitlines()]
        assert len({line.count("|") for line in bare}) == 1
        assert set(bare[1]) <= set("|-:")


def test_a_report_of_a_single_run(tmp_path, drawn):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.csv").unlink()
    (tmp_path / "run" / "environment.json").unlink()
    files = write_report([tmp_path / "run"], tmp_path / "out")
    assert ["rld", "60.00", "60.10", "30", "1seed 0", "900"] in parse(files.html).rows


@pytest.mark.slow
def test_rows_beyond_the_colours_are_counted(tmp_path, drawn):
    for alpha in range(12):
        write_run(tmp_path / str(alpha), "at", top1=50 + alpha, settings={"loss.weight": alpha})
    page = write_report([tmp_path], tmp_path / "out").html
    assert "4 more" in page.read_text()
    assert len({row[0] for row in parse(page).rows if row[0].startswith("at (weight=")}) == 12


def test_the_cost_figure_names_its_split(tmp_path):
    write_run(tmp_path / "run", held_out=0.1)
    page = write_report([tmp_path], tmp_path / "out").markdown.read_text()
    assert "Mean last-epoch top-1 over seeds, on 5,000 held-out training images (stratified)." in page


def test_names_of_networks_in_the_cost_figure_do_not_overlap(tmp_path):
    write_run(tmp_path / "a", student="resnet8", teacher="resnet20", top1=60.0, teacher_top1=91.7)
    write_run(tmp_path / "b", student="wrn16_1", teacher="wrn16_2", top1=99.7, teacher_top1=99.7)
    costs = {"resnet8": 78, "wrn16_1": 175, "resnet20": 272, "wrn16_2": 692}
    costs = {name: Cost(1000 * parameters, 9000 * parameters) for name, parameters in costs.items()}
    figure = Figure(figsize=(3.5, 2.9), layout="constrained")
    pairs, _ = sections(runs_frame(find_runs([tmp_path])))
    cost_scatter(pairs, costs, "cost").panels[0].draw(figure.subplots())
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert [text.get_text() for text in figure.axes[0].texts] == list(costs)
    assert [1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)] == []


def test_unknown_networks_and_html_in_names(tmp_path):
    write_run(tmp_path / "a", student="<gone>", teacher="no_such_network")
    page = write_report([tmp_path], tmp_path / "out", cost_of=measure_cost).html
    assert "&lt;gone&gt;" in page.read_text()
    parse(page)


@pytest.mark.slow
def test_latency_is_measured_on_request(tmp_path, monkeypatch):
    measured = []

    def speed(network, image_shape, *, batch_size, seconds):
        measured.append((type(network).__name__, image_shape, batch_size))
        return 200.0

    monkeypatch.setattr("rld_lightning.tasks.cost.images_per_second", speed)
    write_run(tmp_path / "run")
    page = write_report([tmp_path], tmp_path / "out", cost_of=measure_cost).html.read_text()
    assert [shape for _, *shape in measured] == [[(3, 32, 32), 1]] * 2
    assert "Latency" in page
    assert "the fastest of one image at a time, measured for this report on" in page


@pytest.mark.slow
def test_invalid_weights_files_do_not_fail_the_report(tmp_path):
    folder = write_run(tmp_path / "run", weights=str(tmp_path / "ckpt_epoch_240.pth"))
    for file in (tmp_path / "ckpt_epoch_240.pth", folder / "student.safetensors"):
        file.write_text("version https://git-lfs.github.com/spec/v1")
    assert write_report([tmp_path], tmp_path / "out", cost_of=measure_cost).html.exists()


def test_the_command_of_a_trial_starts_no_sweep(tmp_path):
    folder = write_run(tmp_path / "trial", "dkd")
    (folder / ".hydra" / "overrides.yaml").write_text("[sweep=mine, launcher=joblib, seed=1]")
    page = write_report([tmp_path], tmp_path / "report").html.read_text()
    assert "python scripts/fit.py seed=1 loss=dkd" in page


def test_the_teacher_of_a_sweep_has_no_separate_command(tmp_path):
    write_comparison(tmp_path / "pair", {"kd": 60.0}, 1)
    (tmp_path / "pair" / "teacher" / ".hydra" / "overrides.yaml").unlink()
    (tmp_path / "pair" / "sweep.yaml").write_text("[]")
    page = write_report([tmp_path], tmp_path / "out").markdown.read_text()
    assert f"the teacher of all runs in {tmp_path / 'pair'}, trained before them" in page


@pytest.mark.slow
def test_a_grafted_student_has_its_own_cost(tmp_path):
    folder = write_run(tmp_path / "run", "simkd")
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"model": "resnet8@resnet20", "parameters": 999_999}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = write_report([tmp_path], tmp_path / "out").markdown.read_text()
    assert "resnet8@resnet20: 1 M parameters" in page


@pytest.mark.slow
def test_files_of_an_earlier_report_are_removed(tmp_path, drawn):
    write_comparison(tmp_path / "runs" / "a", {"kd": 59.0, "rld": 61.0})
    write_sweep(tmp_path / "runs" / "sweeps" / "s", alphas=(1, 2), betas=(4, 8), temperatures=(4,))
    out = tmp_path / "out"
    before = write_report([tmp_path / "runs"], out)
    (out / "figures" / "mine.png").write_bytes(b"not the report's")
    (out / "mine.csv").write_text("likewise")
    write_run(tmp_path / "one")
    after = write_report([tmp_path / "one"], out)
    assert {path.name for path in before.tables} > {path.name for path in after.tables}
    assert {path.name for path in out.glob("*.csv")} == {*(path.name for path in after.tables), "mine.csv"}
    figures = {path.name for path in (out / "figures").iterdir()}
    assert figures == {*(path.name for path in after.figures), "mine.png"}
    assert "pair-resnet20-to-resnet8-cifar100-curves.png" in figures


@pytest.mark.slow
def test_the_finding_compares_equal_recipes_and_seeds(tmp_path):
    means = {"ce": 57.0, "kd": 59.0, "dkd": 59.1, "rld": 61.0}
    write_comparison(tmp_path / "a", means, seeds=4, spread=0.05)
    write_run(tmp_path / "lucky", "kd", seed=7, top1=75.0, settings={"loss.temperature": 9.0})
    write_run(tmp_path / "long", "rld", top1=80.0, epochs=240)
    text = write_report([tmp_path], tmp_path / "out").markdown.read_text()
    (headline,) = [line for line in text.splitlines() if line.startswith("- resnet20 → resnet8 on cifar100")]
    assert "of the 4 rows with one recipe and n ≥ 4, rld (epochs=30) is highest" in headline
    assert "(n = 4), " in headline
    assert headline.endswith("; significantly ahead of all 3 rows that it was tested against at 5 %.")


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ({"kd": (0.0, 3.0, -2.9), "dkd": (5.0, 5.1, 5.2)}, "significantly ahead of 1 of the 2 rows that"),
        *(
            pytest.param(gains, words, marks=pytest.mark.slow)
            for gains, words in [
                ({"kd": (0.0, 3.0, -2.9)}, "not significantly ahead of the one row that"),
                (
                    {"kd": (0.0, 3.0, -2.9), "dkd": (0.1, 3.0, -2.9)},
                    "not significantly ahead of any of the 2 rows that",
                ),
                ({"kd": (5.0, 5.1, 5.2)}, "; significantly ahead of the one row that"),
                ({"kd": (5.0, 5.1, 5.2), "dkd": (5.0, 5.1, 5.2)}, "; significantly ahead of both rows that"),
            ]
        ),
    ],
)
def test_the_finding_describes_the_tests(tmp_path, gains, words):
    for seed in range(3):
        write_run(tmp_path / f"rld{seed}", "rld", seed=seed, top1=60.0)
        for method, gain in gains.items():
            write_run(tmp_path / f"{method}{seed}", method, seed=seed, top1=60.0 - gain[seed])
    text = write_report([tmp_path], tmp_path / "out").markdown.read_text()
    (headline,) = [line for line in text.splitlines() if line.startswith("- resnet20 → resnet8 on cifar100")]
    assert words in headline


def test_rows_are_sorted_by_accuracy_and_headers_have_a_scope(tmp_path):
    for method, top1 in (("ce", 57.0), ("kd", 55.0), ("rld", 61.0), ("dkd", 59.0)):
        write_run(tmp_path / method, method, top1=top1)
    page = write_report([tmp_path], tmp_path / "out").html
    rows = [row[0] for row in parse(page).rows if row[1:2] and re.fullmatch(r"\d\d\.00", row[1])]
    assert rows[1:] == ["rld", "dkd", "cestudent alone", "kd"]  # below the teacher
    assert "<th>" not in page.read_text()
    assert '<th scope="col">Method</th>' in page.read_text()


def test_untestable_differences_are_only_counted(tmp_path):
    for method, top1 in (("ce", 50.0), ("kd", 52.0), ("rld", 53.0)):
        for seed in range(3):
            write_run(tmp_path / f"{method}{seed}", method, seed=seed, top1=top1 + 0.5 * seed)
    page = write_report([tmp_path], tmp_path / "out").html.read_text()
    assert "The 3 differences cannot be tested" in page
    assert "corrected for the" not in page


IN_PART = [
    ({"steps": 60, "scheduled_steps": 782, "epochs": 1}, "60 of 782 steps", "the test split"),
    ({"images": 250, "split_images": 10_000}, "23,460 of 23,460 steps", "250 of the 10,000 images of the test split"),
]


@pytest.mark.parametrize(("summary", "trained", "evaluated"), IN_PART)
def test_partial_runs_are_listed_separately(tmp_path, summary, trained, evaluated):
    pair = {"teacher": "wrn40_2", "student": "wrn16_2"}
    write_run(tmp_path / "whole", seed=0, top1=60.0, **pair)
    write_run(tmp_path / "part", seed=1, top1=12.34, summary=summary, **pair)
    files = write_report([tmp_path], tmp_path / "out")
    results = pd.read_csv(tmp_path / "out" / "results.csv").query("method == 'rld'")
    assert (results["n"].tolist(), results["last_mean"].tolist()) == ([1], [60.0])
    rows = parse(files.html).rows
    folder = str(tmp_path / "part")
    assert ["rld", "12.34", trained, evaluated, "1", "wrn40_2_to_wrn16_2", "cifar100", folder] in rows
    assert sum("12.34" in " ".join(row) for row in rows) == 1
    assert "## Runs in part" in files.markdown.read_text()
    assert pd.read_csv(tmp_path / "out" / "runs.csv")["complete"].tolist() == [False, True]


def test_partial_runs_suffice_for_a_report(tmp_path):
    write_run(tmp_path, summary=IN_PART[0][0])
    text = write_report([tmp_path], tmp_path / "out").markdown.read_text()
    assert "1 finished run (1 of them in part) in" in text
    assert "60 of 782 steps" in text


def test_partial_trials_form_a_separate_sweep(tmp_path):
    write_sweep(tmp_path / "sweeps" / "s", alphas=(1, 2), betas=(8,), temperatures=(4,))
    for alpha in (1, 2):
        write_run(
            tmp_path / "sweeps" / "s" / f"part{alpha}", seed=1, top1=12.34, held_out=0.1, epochs=10,
            settings={"loss.alpha": alpha}, summary={"steps": 60, "scheduled_steps": 782},
        )  # fmt: skip
    files = write_report([tmp_path], tmp_path / "out")
    assert "\nTop-1 in percent.\n" in files.markdown.read_text()
    trials = pd.read_csv(tmp_path / "out" / "sweeps.csv")
    assert trials["n"].tolist() == [1] * 4
    assert "## Sweep s: rld, resnet20_to_resnet8, cifar100, in part" in files.markdown.read_text()


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def change(path, **values):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{key}: &{key} [{', '.join([f'*{before}'] * 9)}]\n" for before, key in zip("abcdefgh", "bcdefghi", strict=True)
)


SPOILT = [
    ("config.yaml", lambda path: path.write_text("")),
    ("config.yaml", lambda path: path.write_text("a: [1")),
    ("config.yaml", lambda path: path.write_text("- a list")),
    ("config.yaml", lambda path: path.write_text(BOMB)),
    ("config.yaml", lambda path: path.write_text("[" * 100_000)),
    ("config.yaml", lambda path: path.write_text("a: " + "x" * 2_000_000)),
    ("config.yaml", lambda path: path.write_text("a: 1" + ":1" * 490_000)),
    ("config.yaml", lambda path: path.write_text("!!python/object/apply:os.system ['true']")),
    ("config.yaml", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    ("config.yaml", lambda path: change(path, model=None)),
    ("config.yaml", lambda path: change(path, model={"label": 3})),
    ("config.yaml", lambda path: change(path, data=[])),
    ("config.yaml", lambda path: change(path, model={"label": "a", "teacher": None, "student": {"name": "a"}})),
    (
        "config.yaml",
        lambda path: path.write_text(path.read_text().replace("teachers/", '"\\0"').replace("teacher.safetensors", "")),
    ),
    ("config.yaml", pipe),
    ("environment.json", lambda path: path.write_text("{")),
    ("environment.json", lambda path: path.write_text("[" * 100_000)),
    ("environment.json", lambda path: path.write_text("3")),
    ("environment.json", pipe),
    ("summary.json", lambda path: path.write_text("{}")),
    ("summary.json", lambda path: path.write_text("[" * 100_000)),
    ("summary.json", lambda path: change(path, top1="a lot")),
    ("summary.json", lambda path: change(path, steps=10**30)),
    ("summary.json", lambda path: change(path, dataset=["a"])),
    ("summary.json", lambda path: change(path, teacher_top1="high")),
    ("summary.json", lambda path: change(path, split="val", images=None, val_fraction=0.1)),
    ("summary.json", pipe),
    (".hydra/overrides.yaml", lambda path: path.write_text("{")),
    (".hydra/overrides.yaml", lambda path: path.write_text("3")),
    (".hydra/hydra.yaml", lambda path: path.write_text("hydra: 3")),
    (".hydra/hydra.yaml", pipe),
]


def test_bad_folders_are_named_and_skipped(tmp_path):
    write_run(tmp_path / "good", top1=61.23)
    for number, (name, spoil) in enumerate(SPOILT):
        spoil(write_run(tmp_path / f"bad{number}") / name)
    files = write_report([tmp_path], tmp_path / "out")
    assert ["rld", "61.23", "61.33", "30", "1seed 0", "900"] in parse(files.html).rows
    lines = files.markdown.read_text().splitlines()
    for number in range(len(SPOILT)):
        (line,) = [line for line in lines if line.startswith(f"- `{tmp_path / f'bad{number}'}`: ")]
        assert len(line) < 500
    assert len(pd.read_csv(tmp_path / "out" / "runs.csv")) == 1


def write_huge_numbers(path):
    path.write_text(f"epoch,val/top1,class,predicted,images\n{10**500},1,a,b,{10**30}\n")


def write_many_classes(path):
    rows = "".join(f"a{number},b{number},{number % 7}\n" for number in range(100_000))  # their square exceeds memory
    path.write_text(f"class,predicted,images\n{rows}")


@pytest.mark.parametrize(
    "spoil",
    [pipe, lambda path: path.write_bytes(b"\x00\xff"), write_huge_numbers, write_many_classes,
     lambda path: path.write_text("class,predicted,images\n")],
)  # fmt: skip
def test_bad_optional_files_do_not_fail_the_report(tmp_path, spoil):
    for name in ("metrics.csv", "student.safetensors", "confusion.csv", "wandb_run.json"):
        spoil(write_run(tmp_path / name) / name)
    spoil(write_run(tmp_path / "failed", finished=False) / "error.txt")
    write_run(tmp_path / "good", "kd", top1=61.23)
    assert "61.23" in write_report([tmp_path], tmp_path / "out", cost_of=measure_cost).markdown.read_text()


@pytest.mark.parametrize("link", ["report.html", "figures", "results.csv"])
def test_nothing_is_written_or_removed_through_a_link(tmp_path, link):
    write_run(tmp_path / "runs" / "run")
    out, mine = tmp_path / "runs" / "report", tmp_path / "mine"
    for folder in (out, mine):
        folder.mkdir()
    (mine / "keep.png").write_text("mine")
    (out / "report.md").write_text("![mine](figures/keep.png)")
    (out / link).symlink_to(mine if link == "figures" else mine / "keep.png")
    with pytest.raises(ValueError, match=rf"report/{link} is a link to .*choose another folder with --out"):
        write_report([tmp_path / "runs"], out)
    assert (mine / "keep.png").read_text() == "mine"


def test_unrelated_links_are_allowed(tmp_path):
    write_run(tmp_path / "runs" / "run")
    (tmp_path / "data").mkdir()
    (tmp_path / "runs" / "data").symlink_to(tmp_path / "data")
    assert write_report([tmp_path / "runs"], tmp_path / "runs", cost_of=lambda *_: None).markdown.is_file()
    assert (tmp_path / "runs" / "data").is_symlink()


def test_a_link_as_report_folder_is_not_followed(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "runs" / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "runs" / "report").symlink_to(tmp_path / "mine")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "runs"), "--no-latency"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(REPOSITORY / "scripts" / "report.py"), run_name="__main__")
    assert "is a link out of" in "".join(capsys.readouterr())
    assert not list((tmp_path / "mine").iterdir())


def test_markdown_has_no_links_pictures_or_headings_from_runs(tmp_path):
    outside = "[click](javascript:alert(1)) ![x](https://evil.example/x.png)\n\n# theirs\r## theirs\u2028> theirs"
    write_run(tmp_path / "failed", error=outside)
    write_run(tmp_path / "named", outside.replace("/", ""), student=outside, dataset=outside)
    text = write_report([tmp_path], tmp_path / "out").markdown.read_text()
    targets = re.findall(r"\]\(([^)]*)", text)
    assert targets
    assert all(target.startswith("figures/") for target in targets)
    assert not re.search(r"^[#> ]*theirs", text, re.MULTILINE)
    assert len(text.splitlines()) == len(text.split("\n")) - 1


@pytest.mark.parametrize("name", ["a/../$\\frac{$ 1|b`c", "=<script>alert(1)</script>", "a\u202eb"])
def test_unusual_names(tmp_path, drawn, name):
    options = {"student": name, "teacher": name, "dataset": name}
    folder = write_run(tmp_path / "0", name, **options)
    write_run(tmp_path / "1", "kd", **options)
    change(folder / "environment.json", processor=name)
    write_sweep(tmp_path / "sweeps" / "s", alphas=(1, 2), betas=(8,), temperatures=(4,), method=name)
    files = write_report([tmp_path], tmp_path / "out", title=name)
    parse(files.html)
    for page in (files.html, files.markdown, *files.tables):
        assert "<script>alert" not in page.read_text() or page.suffix == ".csv"
        assert "\u202e" not in page.read_text()
    assert all(path.parent == tmp_path / "out" / "figures" for path in files.figures)
    cells = pd.read_csv(tmp_path / "out" / "runs.csv", dtype=str).to_numpy().ravel()
    assert not [cell for cell in cells if str(cell).startswith(("=", "+", "@"))]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: None, "there are no runs in"),
        (lambda folder: write_run(folder / "a", error="out of memory"), "none of the 1 runs"),
        (lambda folder: (write_run(folder / "a") / "summary.json").write_text("{"), "is not the summary of a run"),
    ],
)
def test_a_report_without_runs_raises_one_sentence(tmp_path, prepare, words):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=words):
        write_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_script_ends_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--latex", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "scripts" / "report.py"), run_name="__main__")
    assert stop.value.code == 2
    assert "nowhere is not a folder" in "".join(capsys.readouterr())


def test_the_script_writes_into_the_first_folder_by_default(tmp_path, drawn, monkeypatch):
    write_run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--no-latency", "--title", "Mine"])
    runpy.run_path(str(REPOSITORY / "scripts" / "report.py"), run_name="__main__")
    assert "<h1>Mine</h1>" in (tmp_path / "report" / "report.html").read_text()


def test_links_point_to_folders_papers_and_wandb_and_run_no_scripts(report):
    page = report.html.read_text()
    links = re.findall(r'href="([^"#][^"]*)"', page)
    assert {link for link in links if "wandb" in link} == {"https://wandb.ai/me/p/runs/a"}
    assert "https://arxiv.org/abs/2403.01427" in links
    folders = [link for link in links if not link.startswith("https://")]
    assert folders
    assert all((report.html.parent / unquote(link) / "config.yaml").exists() for link in folders)
    assert "onclick" not in page
    assert "javascript:" not in page


def test_tooltips_have_seeds_and_sources(report):
    page = report.html.read_text()
    runs = pd.read_csv(report.html.parent / "runs.csv").query("method == 'kd'").sort_values("seed")
    assert (
        f'title="{", ".join(f"seed {s}: {t:.2f} %" for s, t in zip(runs["seed"], runs["top1_last"], strict=True))}"'
        in page
    )
    assert 'title="Sun et al., Logit Standardization' in page


def test_the_confusion_matrix_is_shown_and_escaped(report):
    page = report.html.read_text()
    assert "Confusions of the student" in page
    assert "Most frequent: cat taken for &lt;b&gt;dog 20.0 %" in page
    assert "<b>" not in page


def test_many_classes_show_their_most_frequent_confusions(tmp_path):
    folder = write_run(tmp_path / "run")
    names = ["'=", *(f"c{number:02}" for number in range(1, 30))]  # escaped in the file: it would be a formula
    write_confusion(
        folder,
        [(a, b, 90 if a == b else 10) for a, b in zip(names * 2, names + names[1:] + names[:1], strict=True)][:31],
    )
    figure = confusion_figure(sections(runs_frame(find_runs([tmp_path])))[0][0], "name")
    assert figure.panels[0].alt == "Most frequent confusions of rld: = taken for c01 10.0 %."


def test_tables_for_latex(report):
    text = report.latex.read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") > 0
    rld = next(line for line in text.splitlines() if line.startswith("rld (epochs=240)"))
    assert rld.endswith(r"\\")
    results = pd.read_csv(report.html.parent / "results.csv").set_index("method").loc["rld (epochs=240)"]
    assert rf"{results['last_mean']:.2f} $\pm$ {results['last_std']:.2f}" in rld
    assert r"76.02\textsuperscript{$\dagger$$\ddagger$}" in rld
    for table in text.split(r"\toprule")[1:]:
        lines = [line for line in table.split(r"\bottomrule")[0].splitlines() if line.endswith(r"\\")]
        assert len({line.replace(r"\&", "").count("&") for line in lines}) == 1
    assert r"wrn40\_2 $\rightarrow$ wrn16\_2" in text
    assert (
        escape("50% of a_b & {c} \\ #1 ~ ^")
        == r"50\% of a\_b \& \{c\} \textbackslash{} \#1 \textasciitilde{} \textasciicircum{}"
    )


def test_an_unknown_figure_format_raises(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be written as jpg; choose from pdf, svg"):
        write_report([tmp_path], tmp_path / "out", pictures=["jpg"])
