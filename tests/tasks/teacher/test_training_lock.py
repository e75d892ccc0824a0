"""One of several runs that lack the same teacher trains it."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rld_lightning.distributed import rank_zero_only
from rld_lightning.errors import UserError
from rld_lightning.models.factory import create_model
from rld_lightning.models.teacher.teacher_store import TeacherStore, resolve_teacher_weights
from rld_lightning.tasks.teacher import training_lock as turn
from rld_lightning.tasks.teacher.training_lock import training_turn

NAME = ("digits", "resnet8")


@pytest.fixture
def store(tmp_path):
    return TeacherStore(tmp_path / "teachers")


@pytest.fixture
def model():
    return create_model("resnet8", 10)


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_one_of_several_runs_trains_and_the_others_use_the_result(store, model, tmp_path):
    trained = []

    def run(number):
        with training_turn(store, *NAME, tmp_path / str(number)) as lacks:
            if lacks:
                time.sleep(0.2)
                trained.append(number)
                store.save(model, *NAME, {})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert len(trained) == 1
    assert not list(store.root.rglob("*.holder"))


@pytest.mark.parametrize("kind", ["holder", "lock"])
def test_nothing_is_written_through_a_link_in_a_shared_store(store, tmp_path, kind):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    place = store.path(*NAME)
    place.parent.mkdir(parents=True)
    place.with_name(f".{place.stem}.{kind}").symlink_to(mine)
    with contextlib.suppress(UserError), training_turn(store, *NAME, tmp_path / "run"):
        pass
    assert mine.read_text() == "mine"


def test_waiting_run_says_so_and_trains_if_the_other_is_killed(store, tmp_path, capsys):
    def hold(held):
        with training_turn(store, *NAME, tmp_path / "other"):
            held.set()
            time.sleep(60)

    fork = multiprocessing.get_context("fork")
    other = fork.Process(target=hold, args=(held := fork.Event(),))
    other.start()
    assert held.wait(20)
    threading.Timer(0.3, os.kill, (other.pid, signal.SIGKILL)).start()
    with training_turn(store, *NAME, tmp_path / "run") as lacks:
        assert lacks
    other.join()
    said = " ".join(capsys.readouterr().out.split())
    assert "resnet8 is being trained for" in said
    assert "by another run: waiting for it" in said


def test_other_processes_of_a_run_follow_the_first(store, model, tmp_path, monkeypatch):
    def first(found):
        with training_turn(store, *NAME, tmp_path / "run") as lacks:
            found.append(lacks)
            if lacks:
                assert others.wait(20)
                store.save(model, *NAME, {})

    others, found = threading.Event(), []
    thread = threading.Thread(target=first, args=(found,))
    thread.start()
    while not found:
        time.sleep(0.01)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    place = store.path(*NAME)
    holder = place.with_name(f".{place.stem}.holder")
    holder.write_text(turn._group(tmp_path / "run"))  # as it is where all processes have that environment
    with training_turn(store, *NAME, tmp_path / "run") as lacks:
        assert lacks
    others.set()
    thread.join()
    with training_turn(store, *NAME, tmp_path / "run") as lacks:
        assert not lacks


def test_holder_file_of_a_killed_run_is_ignored(store, model, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # the same as before, and so is the folder
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    place = store.path(*NAME)
    place.parent.mkdir(parents=True)
    holder = place.with_name(f".{place.stem}.holder")
    holder.write_text(turn._group(tmp_path / "run"))
    threading.Timer(0.3, store.save, (model, *NAME, {})).start()  # by another run, which the first waits for
    with training_turn(store, *NAME, tmp_path / "run") as lacks:
        assert not lacks
    assert not holder.exists()


def test_unwritable_store_is_reported_before_training(tmp_path):
    (tmp_path / "teachers").touch()
    with (
        pytest.raises(
            UserError, match=r"resnet8 cannot be kept in .*teachers/digits .*choose another with paths\.teach"
        ),
        training_turn(TeacherStore(tmp_path / "teachers"), *NAME, tmp_path),
    ):
        pass


def test_damaged_teacher_is_retrained_and_never_used(store, model):
    path = store.save(model, *NAME, {})
    assert store.has(*NAME)
    damage(path)
    assert not store.has(*NAME)

    def found(weights):
        return resolve_teacher_weights(weights, name="resnet8", dataset="digits", store=store)

    assert found("fit") is None
    assert found("auto") == path  # which is refused when it is read
