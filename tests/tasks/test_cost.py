"""scripts/cost.py: teacher and student of a run side by side."""

import json
from functools import partial

import pytest
import yaml
from helpers.configs import compose
from helpers.exports import digits_facts, digits_run

from rld_lightning.bench.latency import Measured, measure
from rld_lightning.errors import UserError
from rld_lightning.models import count_macs, count_parameters, create_model
from rld_lightning.models.weights.save import save_weights
from rld_lightning.runs.finished import read_run
from rld_lightning.tasks.cost import Row, _exported_top1, _other_images, cost, measure_cost, networks

options = partial(compose, name="cost", resolve=False)


@pytest.fixture
def run(tmp_path):
    digits_run(tmp_path / "run")
    save_weights(create_model("resnet20", 10), tmp_path / "teacher.safetensors", digits_facts("resnet20"))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["model"]["teacher"]["weights"] = str(tmp_path / "teacher.safetensors")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run"


def ask(run, *overrides):
    return cost(options(f"run={run}", f"paths.run={run.parent / 'cost'}", "seconds=0.02", *overrides))


@pytest.mark.parametrize("in_a_folder", [False, True], ids=["file", "folder"])
def test_teacher_and_student_side_by_side(run, monkeypatch, capsys, in_a_folder):
    pytest.importorskip("matplotlib")
    file = run.parent / "teacher.safetensors"
    if in_a_folder:  # of the run that has trained it, by which it may be given as well
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["model"]["teacher"]["weights"] = str(run.parent / "first")
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        (run.parent / "first").mkdir()
        file = file.rename(run.parent / "first" / "student.safetensors")
    monkeypatch.setattr("rld_lightning.tasks.cost.measure_alone", measure)  # a process takes seconds to start
    teacher, student = ask(run, "backends=[eager]", "batch_sizes=[1,2]", "threads=1", "device=cpu")
    assert [(row.role, row.name, row.top1) for row in (teacher, student)] == [
        ("teacher", "resnet20", 68.0),
        ("student", "resnet8", 60.0),
    ]
    network = create_model("resnet8", 10)
    assert (student.parameters, student.macs) == (count_parameters(network), count_macs(network, (3, 8, 8)))
    assert teacher.file_mb == pytest.approx(file.stat().st_size / 1e6)
    assert student.file_mb == pytest.approx((run / "student.safetensors").stat().st_size / 1e6)
    written = json.loads((run.parent / "cost" / "cost.json").read_text())
    assert written["rows"][1]["measured"]["latencies"][0]["p50"] == student.measured.latencies[0].p50
    assert "1 thread" in written["machine"]
    assert (run.parent / "cost" / "cost.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "Batch of 2" in printed
    assert f"Networks, accuracy on {read_run(run).summary.validated_on}" in " ".join(printed.split())


@pytest.mark.parametrize("size", ["auto", 16, None])
def test_teacher_is_measured_with_its_input_size_in_the_run(run, size):
    facts = digits_facts("resnet20") | {"image_shape": [3, 16, 16], "class_names": [*"0123456789", "none"]}
    save_weights(create_model("resnet20", 11), run.parent / "teacher.safetensors", facts | {"num_classes": 11})
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["teacher"]["image_size"] = size
    config["model"]["teacher"]["class_map"] = "classes.csv"  # no matter to what it costs, and not read
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    finished = read_run(run)
    teacher, student = (network.contender for network in networks(finished))
    shape = (3, 8, 8) if size is None else (3, 16, 16)
    assert (teacher.image_shape, teacher.num_classes) == (shape, 11)
    assert (student.image_shape, student.num_classes) == ((3, 8, 8), 10)
    measured = measure_cost("resnet20", [finished], latency=False)
    assert measured.macs == count_macs(create_model("resnet20", 10), shape)


@pytest.mark.parametrize(
    ("top1", "images", "read"),
    [(50, 360, (50.0, 360)), *((*pair, (None, None)) for pair in ((1e9, 360), (True, 360), (50.0, -3), (50.0, 0)))],
)
def test_accuracy_of_an_export_is_read_only_in_range(run, top1, images, read):
    (run / "export").mkdir()
    files = [{"format": "onnx_int8", "top1": top1, "images": images}]
    (run / "export" / "export.json").write_text(json.dumps({"files": files}))
    assert _exported_top1(read_run(run)) == read


def test_figure_tells_which_accuracy_is_of_fewer_images():
    def row(backend, top1, images):
        return Row("student", "resnet8", backend, 1, 1, None, top1, images, Measured())

    rows = [row("eager", 60.0, 10_000), row("onnx", 60.0, 10_000), row("onnx_int8", 59.0, 1_000)]
    assert _other_images(rows, 10_000) == ", of onnx int8 on 1,000 of them"
    assert _other_images([*rows[:2], row("onnx_int8", None, None)], 10_000) == ""


def test_network_that_does_not_take_the_images_is_not_measured(run, monkeypatch):
    monkeypatch.setattr("rld_lightning.tasks.cost._images", lambda runs: (10, (3, 4, 4)))
    assert measure_cost("vgg8", [read_run(run)]) is None


def test_missing_files_are_named(run):
    (run.parent / "teacher.safetensors").unlink()
    with pytest.raises(UserError, match=r"the teacher's weights are not at .*teacher\.safetensors; run from where"):
        ask(run)
    with pytest.raises(UserError, match="must name at least one each"):
        ask(run, "batch_sizes=[]")


@pytest.mark.slow
def test_all_backends(run):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    rows = ask(run, "backends=[eager,onnx,onnx_int8]", "batch_sizes=[1]", "threads=1", "device=cpu")
    assert [row.measured.error for row in rows] == [""] * 6
    files = {row.backend: row.file_mb for row in rows if row.role == "student"}
    assert files["onnx_int8"] < 0.6 * files["onnx"]
    assert {row.backend: row.top1 for row in rows if row.role == "student"}["onnx_int8"] is None
