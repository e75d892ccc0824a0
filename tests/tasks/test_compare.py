"""A comparison: the teacher first, the same options for all, one report."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.configs import compose
from helpers.run_factory import write_run
from helpers.sweeps import begin_sweep
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rld_lightning import create_model
from rld_lightning.errors import UserError
from rld_lightning.reporting import report
from rld_lightning.runs.settings import differences
from rld_lightning.tasks.cost import measure_cost
from rld_lightning.tasks.sweep import callback as sweep

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare.py"
PAIR = ["model=pair", "model.teacher.name=resnet20", "model.student.name=resnet8", "recipe=quick"]
FIT = [*PAIR, "model.teacher.weights=fit"]


@pytest.fixture
def teachers(monkeypatch):
    """Records the configurations of the teachers that comparisons train, instead of training them."""
    seen = []

    def fit(cfg, resume_hint):
        seen.append(cfg)
        run = write_run(Path(cfg.paths.run), "ce", teacher=None, student="resnet20", seed=cfg.seed)
        OmegaConf.save(cfg, run / "config.yaml", resolve=True)
        return SimpleNamespace(steps=None, complete=False)

    monkeypatch.setattr(sweep, "fit_in_processes", fit)
    return seen


@pytest.fixture
def translated():
    """Returns the overrides into which the script translates an option."""
    return runpy.run_path(str(SCRIPT))["fit_override"]


def compare(folder, *options):
    return begin_sweep("sweep=compare", *options, f"hydra.sweep.dir={folder}")


def test_teacher_first_then_a_student_per_seed_and_loss(teachers, tmp_path):
    config, _ = compare(tmp_path, *FIT, "loss=choice(ce,rld)", "seed=choice(7,1)")
    (teacher,) = teachers
    own = compose("model=single", "model.student.name=resnet20", "loss=ce", "seed=7", "recipe=quick", "method=ce")
    assert not differences(OmegaConf.to_container(teacher, resolve=True), OmegaConf.to_container(own))
    assert teacher.paths.run == str(tmp_path / "teacher")
    weights = f"model.teacher.weights={tmp_path / 'teacher' / 'student.safetensors'}"
    swept = ["loss=choice(ce,rld)", "seed=choice(7,1)"]
    assert config.hydra.overrides.task == ["sweep=compare", *PAIR, *swept, "data.val_fraction=0", weights]
    assert list(config.hydra.sweeper.params) == ["seed", "loss"]  # the seed in front: soon there is one of each loss


def test_more_seeds_keep_the_teacher(teachers, tmp_path):
    compare(tmp_path, *FIT, "loss=choice(rld)", "seed=choice(7)")
    config, _ = compare(tmp_path, *FIT, "loss=choice(rld,kd)", "seed=choice(1,2)")
    assert [cfg.seed for cfg in teachers] == [7]  # it is finished
    assert f"model.teacher.weights={tmp_path / 'teacher' / 'student.safetensors'}" in config.hydra.overrides.task


def test_store_is_not_used(teachers, tmp_path):
    stored = tmp_path / "store" / "cifar100" / "resnet20.safetensors"
    stored.parent.mkdir(parents=True)
    stored.touch()
    compare(tmp_path / "here", *FIT, f"paths.teachers={tmp_path / 'store'}")
    assert len(teachers) == 1
    assert stored.stat().st_size == 0


def test_existing_teacher_is_used_unchanged(teachers, tmp_path):
    (tmp_path / "teacher.pth").touch()
    options = (*PAIR, f"model.teacher.weights={tmp_path / 'teacher.pth'}", "data.val_fraction=0.1", "loss=choice(kd)")
    config, _ = compare(tmp_path, *options)
    assert config.hydra.overrides.task == ["sweep=compare", *options]
    assert not teachers


def test_run_directories_are_ordered_by_pair_loss_and_seed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config, _ = begin_sweep("sweep=compare", *PAIR)
    assert config.hydra.sweep.dir == "runs/compare/resnet20_to_resnet8"
    raw = OmegaConf.to_container(config, resolve=False)["hydra"]["sweep"]["subdir"]
    assert raw == "${hydra:runtime.choices.loss}/seed${seed}"


@pytest.mark.parametrize(
    ("experiment", "loss", "trained"),
    [
        ("experiment=quickstart", "kd", ("digits", "wrn16_2", 15)),
        # which brings losses that cross-entropy does not take
        ("experiment=rld_crd", "combined", ("cifar100", "wrn40_2", 240)),
    ],
)
def test_teacher_has_only_data_and_recipe_of_an_experiment(teachers, tmp_path, experiment, loss, trained):
    compare(tmp_path, experiment, "model.teacher.weights=fit", f"loss=choice({loss})")
    cfg = OmegaConf.create(OmegaConf.to_container(teachers[0], resolve=True))
    assert (instantiate(cfg.data).name, cfg.model.student.name, cfg.recipe.epochs) == trained
    assert (cfg.model.teacher, cfg.model.tuned) == (None, None)
    instantiate(cfg.loss)


def test_comparison_ends_if_its_teacher_fails(monkeypatch, tmp_path, capsys):
    def fails(*_args, **_options):
        raise UserError("out of memory.")

    monkeypatch.setattr(sweep, "fit_in_processes", fails)
    with pytest.raises(SystemExit, match="2"):
        compare(tmp_path, *FIT)
    assert f"the teacher resnet20 could not be trained in {tmp_path / 'teacher'}: out of" in capsys.readouterr().out


def test_report_at_the_end(monkeypatch, tmp_path, capsys):
    written = []

    def write_report(*arguments, **options):
        written.append((*arguments, options))
        return SimpleNamespace(html=Path("report.html"), markdown=Path("report.md"))

    monkeypatch.setattr(report, "write_report", write_report)
    config, callback = compare(tmp_path, *PAIR, "loss=choice(ce,rld)", "seed=choice(0)")
    with pytest.raises(SystemExit, match="2"):  # without students there is none
        callback.on_multirun_end(config)
    assert not written
    run = write_run(tmp_path / "rld" / "seed0", "rld")
    OmegaConf.save(OmegaConf.create(["loss=rld", "seed=0"]), run / ".hydra" / "overrides.yaml")
    callback.on_multirun_end(config)
    options = {"title": "resnet20_to_resnet8: ce, rld", "cost_of": measure_cost}
    assert written == [([tmp_path], tmp_path / "report", options)]
    assert f"{tmp_path / 'report' / 'report.html'}  the results" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ((*FIT, "loss=choice(kd,rdl)"), "loss=rdl is not an option. Did you mean 'rld"),
        ((*FIT, "loss=choice(ce,crd)", "data.mixup=0.3"), "CRDLoss cannot learn from mixtures of images"),
        ((*FIT, "loss=choice(ce,kd)", "model.student.weights=HERE/seven.pth"), "the file has 7 classes, the model 100"),
        (("data=digits", "model=resnet8", "loss=choice(ce,kd)"), "the loss needs a teacher and model=resnet8 has none"),
    ],
)
def test_what_a_trial_cannot_use_is_reported_before_anything_is_trained(teachers, tmp_path, capsys, command, sentence):
    torch.save({"model": create_model("resnet8", 7).state_dict()}, tmp_path / "seven.pth")
    command = [option.replace("HERE", str(tmp_path)) for option in command]
    with pytest.raises(SystemExit, match="2"):
        compare(tmp_path, *command)
    assert sentence in capsys.readouterr().out
    assert not teachers


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("loss=kd", "loss=kd is not for a comparison: give losses="),
        ("+loss@loss.at=at", "is not for a comparison"),
        ("seed=1", "seed=1 is not for a comparison"),
        ("resume=last.ckpt", "is not for a comparison"),
        ("sweep=rld_grid", "is not for a comparison"),
        ("hydra.sweep.subdir=x", "is not for a comparison"),
        ("quick", "quick is not for a comparison"),
        ("losses=", "is not a list"),
        ("losses=ce,,kd", "is not a list"),
        ("losses=ce,ce", "is not a list"),
        ("losses=[rld,at]", "is not a list"),
        ("seeds=0,b", "seeds=0,b must be whole numbers"),
    ],
)
def test_mistakes_end_in_one_sentence_before_anything_starts(translated, option, sentence):
    with pytest.raises(ValueError, match=sentence.replace("[", r"\[")):
        translated(option)


def test_script_names_its_own_options_for_swept_values(translated):
    assert translated("losses=ce, rld_ls") == "loss=choice(ce,rld_ls)"
    assert translated("seeds=0,12") == "seed=choice(0,12)"
    assert translated("folder=my runs/a=b") == "hydra.sweep.dir='my runs/a=b'"
    for option in ("recipe.epochs=3", "launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=x", "seeds.x=1"):
        assert translated(option) == option


def test_script_ends_on_a_mistake(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "seeds=0", "--config-dir", "conf", "losses=ce,ce"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "error: losses=ce,ce is not a list" in capsys.readouterr().out
