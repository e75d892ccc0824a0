"""The quickstart: teacher, student alone and distilled student, trained once and printed side by side."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.run_factory import write_run
from helpers.scripts import run_script
from helpers.sweeps import begin_sweep

from rld_lightning.models import create_model
from rld_lightning.models.weights.save import save_weights
from rld_lightning.runs.summary import read_summary
from rld_lightning.tasks.sweep import callback as sweep
from rld_lightning.tasks.sweep import trial_tables as trials


def export(folder, name):
    facts = {"num_classes": 10, "image_shape": [3, 8, 8]}
    save_weights(create_model(name, 10), folder / "student.safetensors", facts)


@pytest.fixture
def first(monkeypatch):
    """Records the configurations of what is trained before the trials, instead of training it."""
    seen = []

    def fit(cfg, resume_hint):
        seen.append(cfg)
        run = write_run(Path(cfg.paths.run), "ce", teacher=None, student=cfg.model.student.name, dataset="digits")
        export(run, cfg.model.student.name)
        return SimpleNamespace(steps=10, complete=True)

    monkeypatch.setattr(sweep, "fit_in_processes", fit)
    return seen


def test_teacher_and_student_alone_are_trained_first(first, tmp_path):
    options = ("experiment=quickstart", "sweep=quickstart", "loss=dkd", f"paths.teachers={tmp_path / 'teachers'}")
    config, _ = begin_sweep(*options, "seed=3", f"hydra.sweep.dir={tmp_path / 'quickstart'}")
    teacher, alone = first
    assert (teacher.model.student.name, alone.model.student.name) == ("wrn16_2", "wrn16_1")
    for cfg, name in ((teacher, "teacher"), (alone, "alone")):
        assert cfg.paths.run == str(tmp_path / "quickstart" / name)
        assert (cfg.loss._target_, cfg.method, cfg.seed, cfg.data.val_fraction) == (
            "rld_lightning.losses.CELoss", "ce", 3, 0,
        )  # fmt: skip
    assert (tmp_path / "teachers" / "digits" / "wrn16_2.safetensors").exists()
    weights = f"model.teacher.weights={tmp_path / 'quickstart' / 'teacher' / 'student.safetensors'}"
    assert weights in config.hydra.overrides.task
    begin_sweep(*options, "seed=3", f"hydra.sweep.dir={tmp_path / 'another'}")
    assert [Path(cfg.paths.run).name for cfg in first[2:]] == ["alone"]  # the teacher is in the store


def test_networks_are_printed_side_by_side_with_next_steps(tmp_path, capsys, monkeypatch):
    speeds = iter([1000.0, 2000.0])  # one of each network, however often it was trained
    monkeypatch.setattr(trials, "images_per_second", lambda *_: next(speeds))
    trials._cost.cache_clear()
    networks = {"teacher": "wrn16_2", "student": "wrn16_1", "dataset": "digits"}
    export(write_run(tmp_path / "alone", "ce", **networks | {"teacher": None}), "wrn16_1")
    export(write_run(tmp_path / "dkd" / "seed0", "dkd", **networks), "wrn16_1")
    trials.print_networks(tmp_path)
    output = capsys.readouterr().out
    title = "digits, last of 30 epochs, top-1 on the test split (10,000 images)"
    assert title in " ".join(output.split())
    for row in ("│ teacher ", "│ student, cross-entropy ", "│ student, DKD "):
        assert row in output
    assert f"{tmp_path / 'dkd' / 'seed0' / 'curves.png'}  learning curves, DKD" in output
    assert "python scripts/compare.py experiment=quickstart" in output


@pytest.mark.parametrize(("top1", "other", "images"), [(99.72, 99.17, 360), (54.3, 56.2, 10_000), (54.3, 56.6, 10_000)])
def test_difference_within_the_sampling_error_is_reported(top1, other, images):
    alone, distilled = (SimpleNamespace(top1=value, images=images) for value in (top1, other))
    caution = trials._may_be_chance(alone, [alone, distilled])
    p, q = top1 / 100, other / 100
    far = abs(p - q) / ((p * (1 - p) + q * (1 - q)) / images) ** 0.5 > 3  # standard deviations, of two binomials
    assert bool(caution) != far
    if images == 360:
        assert caution == "360 images tell students apart by 1.7 points or more; several seeds tell more"


@pytest.mark.slow
def test_quickstart_from_scratch(tmp_path):
    places = (f"paths.runs={tmp_path / 'runs'}", f"paths.teachers={tmp_path / 'teachers'}")
    result = run_script("quickstart.py", "recipe.epochs=1", "loss=dkd", *places, "trainer=cpu", folder=tmp_path)
    for row in ("│ teacher ", "│ student, cross-entropy ", "│ student, DKD "):
        assert row in result.stdout
    (folder,) = (tmp_path / "runs" / "quickstart").iterdir()
    summary = read_summary(folder / "dkd" / "seed0")
    assert (summary.model, summary.teacher, summary.split) == ("wrn16_1", "wrn16_2", "test")
    assert (folder / "alone" / "student.safetensors").exists()
    assert (tmp_path / "teachers" / "digits" / "wrn16_2.safetensors").exists()
