"""A comparison: the teacher first, the same options for all, one report."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from reporting.run_factory import write_run

from rld_lightning.tasks import compare as module
from rld_lightning.tasks.compare import compare, split_list

PAIR = ["model=pair", "model.teacher.name=resnet20", "model.student.name=resnet8", "recipe=quick"]


@pytest.fixture
def commands(monkeypatch):
    """The commands that a comparison runs, instead of what they do."""
    seen = []

    def run(command, check):
        assert Path(command[1]).name == "fit.py"
        seen.append(command[2:])
        folder = Path(next(o for o in command[2:] if o.startswith("hydra.sweep.dir=")).partition("=")[2])
        if folder.name == "teacher":
            write_run(folder, "ce", teacher=None, student="resnet20")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", run)
    report = SimpleNamespace(html=Path("report.html"), markdown=Path("report.md"))
    monkeypatch.setattr(module, "write_report", lambda *_args, **_options: report)
    return seen


def test_the_teacher_first_then_a_student_for_each_seed_and_loss(commands, tmp_path):
    options = [*PAIR, "model.teacher.weights=fit", "launcher=joblib", "hydra.launcher.n_jobs=2"]
    compare(["ce", "rld"], [0, 1], options, tmp_path)
    teacher, students = commands
    assert teacher == [
        "-m", "model=single", "model.student.name=resnet20", "loss=ce", "recipe=quick", "data.val_fraction=0", "seed=0",
        f"hydra.sweep.dir={tmp_path / 'teacher'}", "hydra.sweep.subdir='.'",
    ]  # fmt: skip
    assert students == [
        "-m", *PAIR, "launcher=joblib", "hydra.launcher.n_jobs=2", "data.val_fraction=0",
        f"model.teacher.weights={tmp_path / 'teacher' / 'student.safetensors'}", "seed=0,1", "loss=ce,rld",
        f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir='${hydra:runtime.choices.loss}/seed${seed}'",
    ]  # fmt: skip


def test_a_teacher_that_is_there_is_used_as_it_is(commands):
    compare(["kd"], [3], [*PAIR, "model.teacher.weights=/my/teacher.pth", "data.val_fraction=0.1"])
    (students,) = commands
    assert "model.teacher.weights=/my/teacher.pth" in students
    assert "data.val_fraction=0" not in students
    assert "hydra.sweep.dir=runs/compare/resnet20_to_resnet8" in students


def test_without_its_teacher_a_comparison_ends(commands, monkeypatch, tmp_path):
    monkeypatch.setattr(module.subprocess, "run", lambda *_args, **_options: SimpleNamespace(returncode=0))
    with pytest.raises(SystemExit, match="2"):
        compare(["kd"], [0], [*PAIR, "model.teacher.weights=fit"], tmp_path)


@pytest.mark.parametrize(
    ("losses", "options", "sentence"),
    [
        (["rld"], ["loss=kd"], "loss=kd is not for a comparison: give losses="),
        (["rld"], ["seed=1"], "seed=1 is not for a comparison"),
        (["rld"], ["hydra.sweep.dir=/x"], "is not for a comparison"),
        (["rld"], ["quick"], "quick is not for a comparison"),
        (["rdl"], [], "rdl"),
        (["rld"], ["recipe.epoch=3"], "epoch"),
    ],
)
def test_mistakes_end_in_one_sentence_before_anything_starts(commands, losses, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        compare(losses, [0], [*PAIR, *options])
    assert not commands


def test_lists():
    assert split_list("ce, rld_ls") == ["ce", "rld_ls"]
    for text in ("", "ce,,kd", "ce,ce", "[rld,at]"):
        with pytest.raises(ValueError, match="is not a list"):
            split_list(text)
