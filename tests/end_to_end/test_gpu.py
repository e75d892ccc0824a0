"""The scripts on a GPU, as a user runs them, for errors in devices and synchronisation."""

import json

import pandas as pd
import pytest
from helpers.scripts import run_script

PAIR = (
    "data=digits",
    "model=pair",
    "model.teacher.name=wrn16_2",
    "model.student.name=wrn16_1",
    "recipe=quick",
    "trainer=gpu",
)
pytestmark = pytest.mark.cuda


def fit(folder, name, *options):
    """Trains a student in the folder ``name``; returns its summary and output."""
    done = run_script("fit.py", *PAIR, "recipe.epochs=3", f"hydra.run.dir={folder / name}", *options, folder=folder)
    return json.loads((folder / name / "summary.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run that trained its teacher, in the folder that other runs share: folder, summary and output."""
    folder = tmp_path_factory.mktemp("gpu")
    return folder, *fit(folder, "first", "model.teacher.weights=fit")


def test_a_run_trains_its_teacher_and_is_captured(first):
    folder, summary, out = first
    assert "capture  each step runs as one CUDA graph" in out
    assert "cannot be captured" not in out
    assert summary["top1"] > 30
    assert len(pd.read_csv(folder / "first" / "metrics.csv")) == 3


def test_the_student_file_has_the_runs_accuracy(first):
    folder, summary, _ = first
    weights = f"weights={folder / 'first' / 'student.safetensors'}"
    run_script("eval.py", "data=digits", weights, f"hydra.run.dir={folder / 'eval'}", "trainer=gpu", folder=folder)
    found = json.loads((folder / "eval" / "evaluation.json").read_text())
    assert found["top1"] == pytest.approx(summary["top1"], abs=0.3)


@pytest.mark.parametrize(
    "options",
    [
        ["model.teacher.cache=true"],
        ["model.teacher.cache=fill"],
        ["model.teacher.cache=false", "model.capture=false"],
        ["model.teacher.cache=false", "model.compile=true"],
        ["model.teacher.cache=fill", "model.compile=true", "loss=dkd"],
        ["trainer.precision=32-true", "trainer.gradient_clip_val=1.0"],
        ["trainer.precision=16-mixed"],
        ["trainer.accumulate_grad_batches=2", "loss=dkd"],
        ["loss=crd", "data.val_fraction=0.2"],
        ["loss=mlkd"],
        ["recipe=patient", "recipe.epochs=3"],
        ["after=[alone,networks,export]"],
    ],
    ids=" ".join,
)
def test_every_kind_of_step_learns(first, options):
    folder, *_ = first
    summary, out = fit(folder, " ".join(options).replace("=", "-").replace("/", "-"), *options)
    assert summary["top1"] > 20
    assert "cannot be captured" not in out


def test_a_run_resumes_where_it_stopped(first):
    folder, *_ = first
    whole, _ = fit(folder, "whole", "recipe.scheduler=null")
    fit(folder, "part", "recipe.scheduler=null", "trainer.max_steps=30")
    fit(folder, "part", "recipe.scheduler=null", f"resume={folder / 'part'}")
    rows = [pd.read_csv(folder / name / "metrics.csv")["val/ce"].tolist()[-1] for name in ("whole", "part")]
    assert rows[0] == pytest.approx(rows[1], rel=0.05)
    assert whole["top1"] > 20


def test_a_sweep_trains_its_trials(first):
    folder, *_ = first
    sweep = ("-m", "loss.alpha=1,2", f"hydra.sweep.dir={folder / 'sweep'}", "hydra.callbacks.sweep.report=true")
    run_script("fit.py", *PAIR, "recipe.epochs=2", "data.val_fraction=0.2", *sweep, folder=folder)
    assert len(list((folder / "sweep").glob("*/summary.json"))) == 2


def test_other_commands_work_on_the_run(first):
    folder, *_ = first
    run_script("cost.py", f"run={folder / 'first'}", "seconds=0.1", "backends=[eager,compiled]", folder=folder)
    run_script("export.py", f"run={folder / 'first'}", folder=folder)
