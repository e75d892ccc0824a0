"""A job writes only into its own directory."""

import os

import hydra
import pytest
from helpers.configs import CONF
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from rld_lightning.errors import UserError
from rld_lightning.hydra.checked_folder import CheckFolder
from rld_lightning.runs.folder import check_folder, locked


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run" / "teacher").mkdir(parents=True)
    (tmp_path / "victim").write_text("secret")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name", ["metrics.csv", ".lock", ".hydra", "last.ckpt", "fit.log", "teacher/summary.json", "wandb", "gone"]
)
@pytest.mark.parametrize("relative", [True, False])
def test_link_that_leads_out_is_refused(run, name, relative):
    target = "../" * (1 + name.count("/")) + "victim" if relative else run.parent / "victim"
    (run / name).symlink_to(target if name != "gone" else "/not/there")
    for look in (check_folder, lambda folder: locked(folder).__enter__()):
        with pytest.raises((ValueError, UserError), match=f"{name} is a link to .*out of the folder.*remove it"):
            look(run)
    assert (run.parent / "victim").read_text() == "secret"


def test_directory_may_be_a_link_and_contain_inner_links(run, tmp_path):
    (run / "latest").symlink_to("teacher")
    (run / "wandb" / "run-1").mkdir(parents=True)
    (run / "wandb" / "latest-run").symlink_to("run-1")
    (run / "wandb" / "run-1" / "file").symlink_to("/etc/hostname")  # W&B's own business
    (tmp_path / "scratch").symlink_to(run)
    check_folder(run)
    check_folder(tmp_path / "scratch")
    check_folder(tmp_path / "new" / "deeper")
    assert not (tmp_path / "new").exists()


def test_file_is_refused_as_a_directory(run):
    for folder in (run.parent / "victim", run.parent / "victim" / "deeper"):
        with pytest.raises(ValueError, match="victim is not a folder; choose another one with"):
            check_folder(folder)


def test_unwritable_directory_is_reported(run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for folder in (run, run / "deeper"):
        with pytest.raises(ValueError, match=r"run cannot be written to: make it writable, or choose another"):
            check_folder(folder)


@pytest.mark.parametrize("kind", ["run", "multirun"])
def test_job_checks_the_directory_that_its_choices_name(tmp_path, monkeypatch, capsys, kind):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("fit", ["data=digits", f"paths.runs={tmp_path}/runs"], return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # as it is when Hydra asks
    look = getattr(CheckFolder(), f"on_{kind}_start")
    look(config)
    (tmp_path / "runs").touch()
    with pytest.raises(SystemExit) as end:
        look(config)
    assert end.value.code == 2
    assert "runs is not a folder" in " ".join(capsys.readouterr().out.split())
    assert HydraConfig.instance().cfg is None
