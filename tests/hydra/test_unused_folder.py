"""A job with a mistake removes the folders that it created, but no results."""

import pytest
from filelock import FileLock

from rld_lightning.hydra.unused_folder import note_missing_folders, remove_unused_folder


def prepare(folder):
    (folder / ".hydra").mkdir(parents=True)
    for name in (".hydra/config.yaml", ".lock", "fit.log", "eval.log", "split.csv"):
        (folder / name).touch()


def test_the_folder_and_created_parents_are_removed(tmp_path):
    (tmp_path / "runs").mkdir()
    note_missing_folders(folder := tmp_path / "runs" / "rld" / "today" / "1")
    prepare(folder)
    remove_unused_folder()
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


def test_parents_with_another_run_are_kept(tmp_path):
    note_missing_folders(folder := tmp_path / "runs" / "1")
    prepare(folder)
    prepare(tmp_path / "runs" / "2")
    remove_unused_folder()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["2"]


@pytest.mark.parametrize("work", ["config.yaml", "teacher/last.ckpt", "diverged.npz", ".hydra", None])
def test_existing_folders_and_results_are_kept(tmp_path, work):
    folder = tmp_path / "run"
    if work in (None, ".hydra"):  # existed before, possibly empty
        folder.mkdir()
    note_missing_folders(folder)
    if work is not None:
        prepare(folder)
        (folder / work).parent.mkdir(exist_ok=True)
        (folder / work).touch()
        remove_unused_folder()
        assert {path.name for path in folder.iterdir()} >= {".hydra", ".lock", "fit.log"}
    remove_unused_folder()
    assert folder.is_dir()


def test_a_locked_folder_is_kept(tmp_path):
    note_missing_folders(folder := tmp_path / "run")
    prepare(folder)
    with FileLock(folder / ".lock"):
        remove_unused_folder()
    assert {path.name for path in folder.iterdir()} == {".hydra", ".lock", "fit.log", "eval.log", "split.csv"}
    remove_unused_folder()
    assert not folder.exists()


def test_a_log_with_a_traceback_is_kept(tmp_path):
    note_missing_folders(folder := tmp_path / "run")
    prepare(folder)
    (folder / "fit.log").write_text("Traceback (most recent call last):\nRuntimeError: out of memory\n")
    remove_unused_folder()
    assert (folder / "fit.log").is_file()
