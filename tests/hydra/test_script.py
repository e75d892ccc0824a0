"""How a script ends before it has a configuration or a folder."""

import pytest

from rld_lightning.errors import UserError
from rld_lightning.hydra.script import _explain, run_task


def test_an_unknown_flag_ends_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fit.py", "--epochs", "3"])
    with pytest.raises(SystemExit) as stop:
        run_task(lambda cfg: None, "fit")
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out.startswith("error: --epochs is not known. Options are written key=value")
    assert not printed.err


def test_a_folder_that_cannot_be_made_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["fit.py", "hydra.run.dir=/proc/x"])
    words = "Traceback\n  os.mkdir(self, mode)\nFileNotFoundError: [Errno 2] No such file or directory: '/proc/x'\n"
    with pytest.raises(UserError, match=r"folder cannot be made, No such file or directory: '/proc/x'; choose another"):
        _explain(words, "fit")


@pytest.mark.parametrize("worked", [False, True])
def test_ctrl_c_before_the_work_leaves_no_folder(monkeypatch, tmp_path, worked):
    folder = tmp_path / "runs" / "1"
    monkeypatch.setattr("sys.argv", ["cost.py", "run=x", f"hydra.run.dir={folder}"])
    monkeypatch.setattr("rld_lightning.hydra.script.leave", lambda code: None)

    def task(cfg):
        if worked:
            (folder / "cost.json").touch()
        raise KeyboardInterrupt

    run_task(task, "cost")
    assert folder.exists() is (tmp_path / "runs").exists() is worked
