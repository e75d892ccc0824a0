"""Atomic writes: a path has the whole new contents, or keeps the previous ones."""

import errno
import fcntl
import multiprocessing
import os
import tempfile
import time

import pytest

from rld_lightning import atomic_files
from rld_lightning.atomic_files import remove_leftovers, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_write_replaces_a_file_and_keeps_the_previous_one(tmp_path):
    path, previous = tmp_path / "new" / "last.ckpt", tmp_path / "new" / "last.previous.ckpt"
    for content in (b"one", b"two", b"three"):
        write_whole(path, content, previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"three", b"two")
    assert names(path.parent) == [path.name, previous.name]


def test_temporary_files_are_in_the_same_folder(tmp_path, monkeypatch):
    """A rename across file systems would not be atomic."""
    monkeypatch.setenv("TMPDIR", "/dev/null/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/nowhere")
    write_whole(tmp_path / "a", b"one")
    assert (tmp_path / "a").read_bytes() == b"one"


def test_the_previous_file_is_kept_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    for content in (b"one", b"two"):
        write_whole(tmp_path / "a", content, previous=tmp_path / "b")
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()) == (b"two", b"one")


@pytest.mark.parametrize("step", ["fsync", "replace", "_verify"])
def test_a_full_or_failing_disk_keeps_the_old_file(tmp_path, monkeypatch, step):
    (path := tmp_path / "a").write_bytes(b"one")

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device", *args[:1])

    monkeypatch.setattr(atomic_files if step == "_verify" else os, step, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(path, b"two")
    assert caught.value.filename == str(path)  # not the temporary file
    monkeypatch.undo()
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["a"]


def test_a_disk_that_returns_other_contents_is_detected(tmp_path, monkeypatch):
    (path := tmp_path / "a").write_bytes(b"one")
    sync = os.fsync

    def lose(descriptor):
        sync(descriptor)
        os.truncate(next(tmp_path.glob(".a.*.tmp")), 1)

    monkeypatch.setattr(os, "fsync", lose)
    with pytest.raises(OSError, match="is not what was written"):
        write_whole(path, b"two")
    assert path.read_bytes() == b"one"


def test_only_leftovers_of_killed_processes_are_removed(tmp_path):
    dead, alive, other = (tmp_path / f".{name}.tmp" for name in ("a[1].x", "a[1].y", "b.x"))
    for path in (dead, alive, other):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 60,) * 2)
    with alive.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_whole(tmp_path / "a[1]", b"whole")
    assert names(tmp_path) == [alive.name, other.name, "a[1]"]
    remove_leftovers(tmp_path / "a[1]")
    assert names(tmp_path) == [other.name, "a[1]"]


def _write(folder, letter, count):
    for _ in range(count):
        write_whole(folder / "a", letter * 50_000)


def test_of_two_writers_one_wins(tmp_path):
    write_whole(tmp_path / "a", b"z" * 50_000)
    processes = [
        multiprocessing.get_context("fork").Process(target=_write, args=(tmp_path, x, 40)) for x in (b"x", b"y")
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        content = (tmp_path / "a").read_bytes()
        assert len(content) == 50_000
        assert len(set(content)) == 1
    assert [process.exitcode for process in processes] == [0, 0]
    assert names(tmp_path) == ["a"]


def test_a_kill_between_two_renames_leaves_no_files(tmp_path):
    """The previous file already has its temporary second name, but not its final one."""
    write_whole(tmp_path / "a", b"one", previous=tmp_path / "b")
    (tmp_path / ".b.0123.tmp").hardlink_to(tmp_path / "a")
    old = time.time() - 10
    os.utime(tmp_path / "a", (old, old))
    write_whole(tmp_path / "a", b"two", previous=tmp_path / "b")
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "b").read_bytes() == b"one"
