"""A comparison: the teacher first, the same options for all, one report."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.configs import compose
from helpers.run_factory import write_run
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rld_lightning.errors import UserError
from rld_lightning.runs.likeness import differences
from rld_lightning.tasks import compare as module
from rld_lightning.tasks import start
from rld_lightning.tasks.compare import compare, split_list, split_seeds

PAIR = ["model=pair", "model.teacher.name=resnet20", "model.student.name=resnet8", "recipe=quick"]


@pytest.fixture
def sweeps(monkeypatch):
    """What a comparison starts, instead of what that does: a teacher's configuration; a sweep's three arguments."""
    seen = []

    def run_trial(cfg, _way_on):
        seen.append(cfg)
        write_run(Path(cfg.paths.run), "ce", teacher=None, student="resnet20", seed=7)

    monkeypatch.setattr(start, "run_trial", run_trial)
    monkeypatch.setattr(module, "run_sweep", lambda *arguments: seen.append(arguments) or 0)
    report = SimpleNamespace(html=Path("report.html"), markdown=Path("report.md"))
    monkeypatch.setattr(module, "write_report", lambda *_args, **_options: report)
    return seen


def test_the_teacher_first_then_a_student_for_each_seed_and_loss(sweeps, tmp_path):
    options = [*PAIR, "model.teacher.weights=fit", "launcher=joblib", "hydra.launcher.n_jobs=2"]
    compare(["ce", "rld"], [7, 1], options, tmp_path)
    teacher, students = sweeps
    own = compose("model=single", "model.student.name=resnet20", "loss=ce", "seed=7", "recipe=quick", "method=ce")
    assert not differences(OmegaConf.to_container(teacher, resolve=True), OmegaConf.to_container(own))
    assert teacher.paths.run == str(tmp_path / "teacher")
    weights = f"model.teacher.weights={tmp_path / 'teacher' / 'student.safetensors'}"
    assert students == (
        [*options[:4], *options[5:], "data.val_fraction=0", weights, "seed=choice(7,1)", "loss=choice(ce,rld)"],
        tmp_path,
        "${hydra:runtime.choices.loss}/seed${seed}",
    )


def test_more_seeds_keep_the_teacher(sweeps, tmp_path):
    options = [*PAIR, "model.teacher.weights=fit"]
    compare(["rld"], [7], options, tmp_path)
    compare(["rld"], [1, 2], options, tmp_path)
    assert sweeps[2].seed == 7
    assert sweeps[3][0][-2:] == ["seed=choice(1,2)", "loss=choice(rld)"]


def test_a_teacher_that_is_there_is_used_as_it_is(sweeps):
    compare(["kd"], [3], [*PAIR, "model.teacher.weights=/my/teacher.pth", "data.val_fraction=0.1"])
    ((overrides, folder, _),) = sweeps
    assert "model.teacher.weights=/my/teacher.pth" in overrides
    assert "data.val_fraction=0" not in overrides
    assert folder == Path("runs/compare/resnet20_to_resnet8")


@pytest.mark.parametrize(
    ("experiment", "trained"),
    [
        ("experiment=quickstart", ("digits", "wrn16_2", 15)),
        ("experiment=rld_crd", ("cifar100", "wrn40_2", 240)),  # which brings losses that cross-entropy does not take
    ],
)
def test_the_teacher_has_data_and_recipe_of_an_experiment_and_nothing_else(sweeps, tmp_path, experiment, trained):
    compare(["kd"], [0], [experiment, "model.teacher.weights=fit"], tmp_path)
    cfg = OmegaConf.create(OmegaConf.to_container(sweeps[0], resolve=True))
    assert (instantiate(cfg.data).name, cfg.model.student.name, cfg.recipe.epochs) == trained
    assert (cfg.model.teacher, cfg.model.tuned) == (None, None)
    instantiate(cfg.loss)


def test_without_its_teacher_a_comparison_ends(sweeps, monkeypatch, tmp_path):
    def fails(*_):
        raise UserError("out of memory.")

    monkeypatch.setattr(start, "run_trial", fails)
    with pytest.raises(UserError, match=r"the teacher resnet20 could not be trained in .*teacher: out of memory\."):
        compare(["kd"], [0], [*PAIR, "model.teacher.weights=fit"], tmp_path)
    assert not sweeps


@pytest.mark.parametrize("status", [2, 130])
def test_without_students_there_is_no_report(sweeps, monkeypatch, tmp_path, status):
    monkeypatch.setattr(module, "run_sweep", lambda *_: status)
    monkeypatch.setattr(module, "write_report", lambda *_args, **_options: pytest.fail("there is nothing to report"))
    with pytest.raises(SystemExit, match=str(status)):
        compare(["kd"], [0], PAIR, tmp_path)


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
def test_mistakes_end_in_one_sentence_before_anything_starts(sweeps, losses, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        compare(losses, [0], [*PAIR, *options])
    assert not sweeps


def test_lists():
    assert split_list("ce, rld_ls") == ["ce", "rld_ls"]
    for text in ("", "ce,,kd", "ce,ce", "[rld,at]"):
        with pytest.raises(ValueError, match="is not a list"):
            split_list(text)
    assert split_seeds("0,12") == [0, 12]
    with pytest.raises(ValueError, match="seeds=0,b must be whole numbers"):
        split_seeds("0,b")
