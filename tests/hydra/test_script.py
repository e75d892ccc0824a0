"""Scripts that end before the config is composed or the folder is created."""

import socket
import time

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from rld_lightning import __version__
from rld_lightning.errors import UserError
from rld_lightning.hydra.script import _explain, exit_on_user_error, run_task


def test_an_unknown_flag_prints_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fit.py", "--epochs", "3"])
    with pytest.raises(SystemExit) as stop:
        run_task(lambda cfg: None, "fit")
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out.startswith("error: --epochs is not known. Options are written key=value")
    assert not printed.err


def test_the_version_is_the_packages_and_not_hydras(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fit.py", "seed=1", "--version"])
    run_task(lambda cfg: pytest.fail("ran"), "fit")
    assert capsys.readouterr().out == f"rld-lightning {__version__}\n"


def test_a_folder_that_cannot_be_created_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["fit.py", "hydra.run.dir=/proc/x"])
    words = "Traceback\n  os.mkdir(self, mode)\nFileNotFoundError: [Errno 2] No such file or directory: '/proc/x'\n"
    message = "the run directory cannot be made, No such file or directory: '/proc/x'; choose another"
    with pytest.raises(UserError, match=message):
        _explain(words, "fit")


@pytest.mark.parametrize("worked", [False, True])
def test_ctrl_c_before_the_work_removes_the_folder(monkeypatch, tmp_path, worked):
    folder = tmp_path / "runs" / "1"
    monkeypatch.setattr("sys.argv", ["cost.py", "run=x", f"hydra.run.dir={folder}"])
    monkeypatch.setattr("rld_lightning.hydra.script.exit_now", lambda code: None)

    def task(cfg):
        if worked:
            (folder / "cost.json").touch()
        raise KeyboardInterrupt

    run_task(task, "cost")
    assert folder.exists() is (tmp_path / "runs").exists() is worked


@pytest.mark.parametrize(("started", "rank"), [(None, 0), ("torchrun", 0), ("torchrun", 3), ("srun", 3)])
def test_a_mistake_is_left_to_rank_0_and_said_by_another_with_its_name(monkeypatch, capsys, started, rank):
    known = {"torchrun": {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4"}, "srun": {"SLURM_NTASKS": "4"}}
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in known.get(started, {}).items():
        monkeypatch.setenv(name, value)
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        raise UserError("no such folder")
    assert stop.value.code == 2
    assert len(waited) == (rank > 0)
    who = f"rank {rank} of 4, on {socket.gethostname()}: " * (rank > 0)
    assert capsys.readouterr().out == f"error: {who}no such folder\n"
