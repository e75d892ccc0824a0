"""Runs that are interrupted at any point and resumed give the same results as uninterrupted ones."""

import csv
import json

import pytest
import torch
from helpers.configs import compose
from safetensors.torch import load_file, save_file

from rld_lightning import create_model
from rld_lightning.callbacks import Throughput
from rld_lightning.errors import UserError
from rld_lightning.tasks.fit import fit

PAIR = ("model=pair", "model.teacher.name=resnet8", "model.student.name=resnet8", "loss=kd")
SHORT = ("recipe=quick", "recipe.epochs=2", "trainer.limit_train_batches=5", "trainer.limit_val_batches=1")


class Killed(BaseException):
    """Ends a run with an exception that it does not catch."""


def run(folder, *overrides):
    teacher = ("model.teacher.weights=auto", f"paths.teachers={folder.parent / 'teachers'}")
    options = ("data=digits", *PAIR, *teacher, *SHORT, "callbacks.progress=null", "print_config=false", "trainer=cpu")
    cfg = compose(*options, "trainer.precision=32-true", *overrides, resolve=False)
    cfg.paths.run = str(folder)
    return fit(cfg)


def killed(folder, step, *overrides):
    """Runs a training that ends after a step, before the step is saved."""

    measure = Throughput.on_train_batch_end

    def kill(callback, trainer, *rest):
        if trainer.global_step == step:
            raise Killed
        measure(callback, trainer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Throughput, "on_train_batch_end", kill)
        with pytest.raises(Killed):
            run(folder, *overrides)


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [
            {name: value for name, value in row.items() if name != "train/images_per_s"} for row in csv.DictReader(file)
        ]


def check(folder, whole, *others):
    ours, theirs = (load_file(f / "student.safetensors") for f in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert rows(folder) == rows(whole)
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, whole))
    for name in ("run", "images_per_s", "seconds", "peak_memory_gb", *others):
        assert ours.pop(name, 0) is not None
        assert theirs.pop(name, 0) is not None
    assert ours == theirs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with an untrained teacher."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    (folder / "teachers" / "digits").mkdir(parents=True)
    save_file(create_model("resnet8", 10).state_dict(), folder / "teachers" / "digits" / "resnet8.safetensors")
    run(folder / "run")
    return folder / "run"


@pytest.fixture
def folder(whole):
    """A new folder next to ``whole``, with the same teacher."""
    return whole.parent / f"run{len(list(whole.parent.iterdir()))}"


EVERY_STEP = "callbacks.checkpoint_last.steps=1"


@pytest.mark.thinned(2)
@pytest.mark.parametrize("step", [pytest.param(s, marks=() if s == 8 else pytest.mark.slow) for s in range(2, 11)])
def test_a_run_killed_after_a_step_resumes_exactly(folder, whole, step):
    killed(folder, step, EVERY_STEP)
    run(folder, EVERY_STEP, f"resume={folder}")
    check(folder, whole)


@pytest.mark.slow
def test_a_compiled_run_is_equal_up_to_rounding_and_resumes_exactly(folder, whole, capsys):
    compiled = folder.with_name(f"{folder.name}_compiled")
    run(compiled, "model.compile=true")
    assert "compile  student, teacher, loss in training steps" in capsys.readouterr().out
    ours, theirs = (load_file(f / "student.safetensors") for f in (compiled, whole))
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-2, atol=1e-3)
    killed(folder, 8, EVERY_STEP, "model.compile=true")
    run(folder, EVERY_STEP, "model.compile=true", f"resume={folder}")
    check(folder, compiled)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(folder, whole, capsys):
    killed(folder, 3)
    run(folder, f"resume={folder}/last.ckpt")
    assert "no checkpoint" in capsys.readouterr().out
    check(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("rld_lightning.tasks.run.results.save_weights", 1),
        ("rld_lightning.reporting.curves.plot_curves", 1),
        ("rld_lightning.runs.summary.Summary.write", 1),
        ("rld_lightning.callbacks.MetricsFile.save", 3),  # validation, epoch, ...
        ("rld_lightning.callbacks.MetricsFile.save", 4),
        ("rld_lightning.callbacks.MetricsFile.finalize", 1),
    ],
)
def test_a_run_killed_at_its_end_resumes_exactly(folder, whole, monkeypatch, capsys, place, count):
    calls = []

    def kill(*_, **__):
        calls.append(1)
        if len(calls) == count:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(place, kill)
        with pytest.raises(Killed):
            run(folder)
    run(folder, f"resume={folder}")
    if "results" in place:
        assert "nothing is left to train: all 2 epochs are trained" in capsys.readouterr().out
    check(folder, whole)


def test_a_finished_run_resumed_elsewhere_writes_all_files(folder, whole):
    run(folder, f"resume={whole}")
    check(folder, whole)
    assert {path.name for path in folder.iterdir()} >= {"last.ckpt", "best.ckpt", "metrics.csv", "curves.png"}
    assert rows(folder) == rows(whole)
    with pytest.raises(UserError, match="its schedule depends on the length of the run"):
        run(folder, f"resume={folder}", "recipe.epochs=3")


@pytest.mark.slow
def test_a_teacher_killed_in_its_first_epoch_is_trained_again(tmp_path):
    first = "model.teacher.weights=fit"
    run(tmp_path / "whole", first)
    assert not list(
        (tmp_path / "teachers").rglob("*.safetensors")
    )  # trained for a few batches only, so not stored for other runs
    killed(tmp_path / "run", 3, first)
    assert not (tmp_path / "run" / "config.yaml").exists()
    run(tmp_path / "run", first, f"resume={tmp_path / 'run'}")
    check(tmp_path / "run", tmp_path / "whole", "teacher_sha256")


@pytest.mark.slow
def test_more_epochs_with_a_step_schedule(whole, folder):
    steps = ("recipe=cifar240", "trainer.limit_train_batches=5", "trainer.limit_val_batches=1")
    other = folder.with_name(f"{folder.name}-whole")
    run(other, *steps, "recipe.epochs=3")
    run(folder, *steps, "recipe.epochs=1")
    run(folder, *steps, "recipe.epochs=3", f"resume={folder}")
    check(folder, other)


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(7,), (2, 5, 9)])
def test_two_processes_resume_within_an_epoch(whole, folder, stops):
    steps = ("recipe=cifar240", "trainer.limit_train_batches=5", "trainer.limit_val_batches=1", "trainer=ddp_cpu")
    other = folder.with_name(f"{folder.name}-whole")
    run(other, *steps, "recipe.epochs=2")
    resume = ()
    for stop in (*stops, -1):
        run(folder, *steps, "recipe.epochs=2", f"trainer.max_steps={stop}", *resume)
        resume = (f"resume={folder}",)
    check(folder, other)
    log = (folder / "fit.log").read_text()
    assert log.count("training  SGD, learning rate 0.05, batch 64 = 2 x 32 on cpu") == len(stops) + 1


@pytest.mark.slow
def test_resuming_with_more_time(whole, folder, capsys):
    time = "trainer.max_time=00:00:00:{}".format
    options = ("recipe.epochs=40", EVERY_STEP)
    other = folder.with_name(f"{folder.name}-whole")
    run(other, *options)
    run(folder, *options, time("02"))
    capsys.readouterr()
    assert run(folder, *options, time("02"), f"resume={folder}").steps < 200
    assert "nothing is left to train: the time (trainer.max_time) is over" in capsys.readouterr().out
    run(folder, *options, "trainer.max_time=01:00:00:00", f"resume={folder}")
    check(folder, other)
