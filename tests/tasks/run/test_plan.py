"""Values determined for a run go into its plan, never into its configuration."""

import hashlib
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from helpers.configs import compose
from helpers.plans import make_plan
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError

from rld_lightning.runs.settings import differences, settings
from rld_lightning.runs.summary import read_summary
from rld_lightning.tasks.evaluate import evaluate
from rld_lightning.tasks.fit import fit
from rld_lightning.tasks.run.plan import completed_config, plan_teacher, standalone_config, with_values
from rld_lightning.tasks.trial import run_trial

PAIR = ("data=digits", "model=pair", "model.teacher.name=resnet14", "model.student.name=resnet8", "recipe=quick")
SHORT = ("recipe.epochs=1", "trainer=cpu", "data.subset=0.1", "print_config=false", "callbacks.progress=null")


@pytest.mark.parametrize("task", [fit, pytest.param(run_trial, marks=pytest.mark.slow)])
def test_run_does_not_modify_its_configuration(tmp_path, task):
    paths = (f"paths.run={tmp_path / 'run'}", f"paths.teachers={tmp_path / 'teachers'}")
    cfg = compose(*PAIR, *SHORT, *paths, "loss=kd", "model.teacher.weights=fit", "logger=csv", resolve=False)
    before = OmegaConf.to_container(cfg)
    task(cfg)
    assert OmegaConf.to_container(cfg) == before
    with pytest.raises(ReadonlyConfigError):
        cfg.seed = 1
    left = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert left.model.teacher.weights == str(
        tmp_path / "run" / "teacher" / "student.safetensors"
    )  # of a part of the data
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["rld_lightning"]
    assert saved["settings"] == settings(OmegaConf.to_container(left))
    assert saved["teacher_sha256"] == left.model.teacher.sha256 == read_summary(tmp_path / "run").teacher_sha256
    assert saved["teacher_sha256"] == hashlib.sha256(Path(left.model.teacher.weights).read_bytes()).hexdigest()
    if task is fit:
        evaluation = (f"weights={tmp_path / 'run' / 'student.safetensors'}", f"paths.run={tmp_path / 'eval'}")
        cfg = compose("data=digits", "trainer=cpu", *evaluation, name="eval", resolve=False)
        before = OmegaConf.to_container(cfg)
        evaluate(cfg)
        assert OmegaConf.to_container(cfg) == before


def test_plan_is_immutable(tmp_path):
    plan = make_plan(tmp_path)
    with pytest.raises(FrozenInstanceError):
        plan.run = Path("/elsewhere")


def test_written_configuration_contains_determined_values(tmp_path):
    cfg = compose(*PAIR, f"paths.run={tmp_path}", resolve=False)
    plan = make_plan(tmp_path)
    left = completed_config(cfg, replace(plan, teacher=replace(plan.teacher, weights="/my/teacher.pth", sha256="ab")))
    left, before = (OmegaConf.to_container(part, resolve=True) for part in (left, cfg))
    assert differences(before, left).keys() == {"model.teacher.weights"}
    assert left["model"]["teacher"]["weights"] == "/my/teacher.pth"
    assert left["model"]["teacher"]["sha256"] == "ab"


def test_changed_configuration_is_a_copy():
    cfg = compose("recipe=quick", "recipe.epochs=30", resolve=False)
    other = with_values(cfg, {"recipe.epochs": 7, "logger.mine.name": "x"})
    assert (cfg.recipe.epochs, cfg.trainer.max_epochs, "mine" in cfg.logger) == (30, 30, False)
    assert (other.recipe.epochs, other.trainer.max_epochs, other.logger.mine.name) == (7, 7, "x")
    with pytest.raises(ReadonlyConfigError):
        other.seed = 1


def test_a_network_trained_alone_for_a_run_has_the_loss_of_a_run_with_cross_entropy(tmp_path):
    """Otherwise a report would list the two as different settings."""
    own = standalone_config(compose("data=digits", "loss=rld", resolve=False), "resnet8", None, tmp_path)
    assert own.loss == compose("loss=ce", resolve=False).loss


def test_learning_rate_scales_with_the_batch_if_requested_and_the_schedule_follows(tmp_path):
    plan = make_plan(tmp_path, batch_size=256)
    assert plan.learning_rate == 0.1
    plan = replace(plan, scale_lr_from=64)
    assert plan.learning_rate == pytest.approx(0.4)
    cfg = compose("recipe=quick", "data.batch_size=256", "recipe.optimizer.lr=0.1", resolve=False)
    recipe = with_values(cfg, {"recipe.optimizer.lr": plan.learning_rate}).recipe
    assert instantiate(recipe.optimizer).keywords["lr"] == pytest.approx(0.4)
    assert recipe.scheduler.max_lr == pytest.approx(0.4)
    assert cfg.recipe.optimizer.lr == 0.1
    with pytest.raises(ValueError, match=r"recipe\.scale_lr_from=0 must be a batch size"):
        _ = replace(plan, scale_lr_from=0).learning_rate


def test_batch_size_is_recorded_only_if_it_was_chosen(tmp_path):
    given = compose("model=wrn16_1", "loss=ce", "data=digits", "recipe=quick", "data.batch_size=4")
    left = completed_config(given, replace(make_plan(tmp_path), teacher=None, batch_size=4))
    assert (left.data.batch_size, left.recipe.batch_size) == (4, given.recipe.batch_size) == (4, 64)
    chosen = compose("model=wrn16_1", "loss=ce", "data=digits", "recipe=quick", "recipe.batch_size=auto")
    left = completed_config(chosen, replace(make_plan(tmp_path), teacher=None, batch_size=32))
    assert (left.data.batch_size, left.recipe.batch_size) == (32, 32)


def test_values_of_a_teacher_that_the_model_lacks_are_refused():
    cfg = compose("data=digits", "model=resnet8", "loss=ce", "+model.teacher.name=resnet14", resolve=False)
    with pytest.raises(ValueError, match=r"^model.teacher has only name, because the chosen model has no teacher; "):
        plan_teacher(cfg.model.teacher)
