"""Where a run's teacher is, and what a folder that it goes on from may say about that."""

import pytest
from omegaconf import OmegaConf

from rld_lightning.tasks.teacher import _teacher_before


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Leaves the configuration of a run, and gives its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher.safetensors").touch()

    def write(config):
        if isinstance(config, str):
            (tmp_path / "config.yaml").write_text(config)
        else:
            OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
        return tmp_path

    return write


def said(weights, name="resnet20"):
    return {"model": {"teacher": {"name": name, "weights": weights}}}


def test_a_run_keeps_the_teacher_that_it_had(folder, tmp_path):
    weights = str(tmp_path / "teacher.safetensors")
    assert _teacher_before(folder(said(weights)), "resnet20") == weights
    assert _teacher_before(tmp_path / "elsewhere", "resnet20") is None


@pytest.mark.parametrize(
    "config",
    [
        said("gone.safetensors"), said("."), said("pretrained"), said("teacher.safetensors", name="resnet32"),
        said({"_target_": "pathlib.Path", "_args_": ["it_ran"]}), said(["teacher.safetensors"]), said(3), said(None),
        {"model": {"teacher": None}}, {"model": {"teacher": "teacher.safetensors"}}, {"model": ["teacher"]}, {}, [],
        "model: {teacher: {name: resnet20, weights: '${oc.env:WEIGHTS}'}}",
    ],
    ids=str,
)  # fmt: skip
def test_anything_but_a_file_of_weights_says_nothing(folder, monkeypatch, config):
    monkeypatch.setenv("WEIGHTS", "teacher.safetensors")
    assert _teacher_before(folder(config), "resnet20") is None


@pytest.mark.parametrize("text", ["a: [", "!!python/object/apply:os.getcwd []", "\x00"])
def test_what_is_no_plain_yaml_is_refused_by_name(folder, text):
    with pytest.raises(ValueError, match=r"config\.yaml is not the configuration of a run \("):
        _teacher_before(folder(text), "resnet20")
