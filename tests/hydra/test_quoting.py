"""Values that mean the same to the user, the shell and Hydra."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from rld_lightning.hydra.quoting import as_argument, as_command, with_quotes
from rld_lightning.hydra.script import with_absolute_paths

PATHS = (
    *("runs/kd/last.ckpt", "sweep/data.subset=1.0,seed=2/last.ckpt", "meine Fotos (1)", "Köter/Ä", "a[1]{2}", "it's/a"),
    *(
        "null",
        "1.0",
        "${paths.data}/x",
        "a\\'b",
        "end\\",
        "s3://bucket/name",
        "a;b&c|d",
        "#x",
        "50%",
        '"a"',
        "~/x",
        "$HOME",
    ),
)


def read(argument):
    override = OverridesParser.create().parse_override(argument)
    return OmegaConf.create({"value": override.value()}).value


@pytest.mark.parametrize("path", PATHS)
def test_printed_overrides_can_be_pasted(path):
    (argument,) = shlex.split(as_argument("resume", path))
    assert read(argument) == path


def test_a_printed_command_parses_to_its_arguments():
    given = ["loss.alpha=1", "data.root='a b'", "loss=[kd,at]", "~recipe.optimizer.momentum", "x='it\\'s'"]
    assert shlex.split(as_command(given)) == given


def test_paths_are_read_without_quotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=1/x.pth", "a=2/x.pth", "b,c/x.pth", "[d]/x.pth"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    for path in ("a=1/x.pth", "b,c/x.pth", "[d]/x.pth", "nowhere/a=1 (2)"):
        (argument,) = with_quotes([f"weights={path}"])
        assert read(argument) == path
    assert with_quotes(["weights=a=1/x.pth,a=2/x.pth"]) == ["weights='a=1/x.pth','a=2/x.pth'"]
    (argument,) = with_quotes(["data.root=${oc.env:HOME}/a=1"])
    assert argument == "data.root='${oc.env:HOME}/a=1'"
    same = ["-m", "seed=0,1", "loss=[kd,at]", "weights=a,b", "resume='a=1'", "data=digits", "loss.alpha=1=2", "~logger"]
    same += ["model.teacher.weights=null", "resume=null"]
    assert with_quotes(same) == same


def test_relative_paths_are_resolved_in_the_commands_folder(tmp_path):
    cfg = OmegaConf.create(
        {
            "paths": {"data": "data", "teachers": "/store", "run": "${paths.data}/run"},
            "data": {"root": "photos", "cache": "s3://bucket"},
            "model": {"teacher": {"weights": "fit"}, "student": {"weights": "w.pth"}},
            "resume": None,
        }
    )
    found = with_absolute_paths(cfg, tmp_path)
    assert (found.paths.data, found.paths.teachers) == (f"{tmp_path}/data", "/store")
    assert (found.data.root, found.data.cache, found.resume) == (f"{tmp_path}/photos", "s3://bucket", None)
    assert (found.model.teacher.weights, found.model.student.weights) == ("fit", f"{tmp_path}/w.pth")
    assert cfg.data.root == "photos"
