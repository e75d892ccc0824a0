"""Where a run's teacher is, and what a resumed run's checkpoint records about it."""

import gc
import hashlib
import weakref
from dataclasses import replace

import pytest
from helpers.configs import compose
from helpers.plans import make_plan

from rld_lightning.data import DigitsDataModule
from rld_lightning.models.factory import create_model
from rld_lightning.models.normalisation import Normalisation
from rld_lightning.models.teacher.teacher_store import TeacherStore
from rld_lightning.models.weights.save import save_weights
from rld_lightning.runs.checkpoint import RunRecord
from rld_lightning.tasks.fit import fit
from rld_lightning.tasks.run.build import build_module
from rld_lightning.tasks.teacher.network import build_teacher
from rld_lightning.tasks.teacher.weights import find_teacher, train_teacher

USUAL = Normalisation((0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def known(tmp_path):
    """Returns a teacher in a file, the record of a run that used it, and the data."""
    path = tmp_path / "teacher.safetensors"
    save_weights(create_model("resnet8", 10), path)
    teacher = replace(make_plan(tmp_path).teacher, name="resnet8", weights=str(path))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    (data := DigitsDataModule()).setup("fit")
    said = {"model.teacher.name": "resnet8", "model.teacher.weights": str(path)}
    return teacher, RunRecord(said, sha256), data


def test_replaced_teacher_is_not_used_for_a_resumed_run(known):
    teacher, before, data = known
    assert build_teacher(teacher, data, USUAL, before)[2] == before.teacher_sha256
    build_teacher(replace(teacher, sha256=before.teacher_sha256), data, USUAL)
    build_teacher(teacher, data, USUAL, RunRecord({}, None))
    save_weights(create_model("resnet8", 10), teacher.weights)
    with pytest.raises(ValueError, match=r"is not the teacher that the run had: its SHA-256 is .* restore that file"):
        build_teacher(teacher, data, USUAL, before)
    with pytest.raises(ValueError, match=f"has the SHA-256 .*, not {before.teacher_sha256}: give the file"):
        build_teacher(replace(teacher, sha256=before.teacher_sha256), data, USUAL)


def test_checkpoint_records_the_teacher_of_its_run(known, tmp_path):
    teacher, before, _ = known
    wanted, store = replace(teacher, weights="fit"), make_plan(tmp_path).store
    assert find_teacher(wanted, "digits", store, before) == teacher.weights
    gone = RunRecord(before.settings | {"model.teacher.weights": "/gone.pth"}, "ab")
    with pytest.raises(ValueError, match=r"the teacher of the run, /gone\.pth, is gone or damaged: bring it back"):
        find_teacher(wanted, "digits", store, gone)


@pytest.mark.parametrize("said", [{"weights": "gone.safetensors"}, {"weights": "."}, {"name": "resnet32"}, {}], ids=str)
def test_records_other_than_a_file_of_the_wanted_teacher_are_ignored(known, tmp_path, said):
    teacher, before, _ = known
    settings = {f"model.teacher.{key}": value for key, value in said.items()}
    told = RunRecord(before.settings | settings if said else {}, None)
    assert find_teacher(replace(teacher, weights="fit"), "digits", make_plan(tmp_path).store, told) is None


def test_teacher_is_trained_on_the_input_of_the_student(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr("rld_lightning.tasks.teacher.weights.run_once", lambda cfg, fit, name: found.append(cfg.data))
    own = ("model.teacher.mean=[0.5,0.5,0.4]", "model.teacher.std=[0.5,0.5,0.3]")
    for overrides in ((), own):
        cfg = compose(
            "data=digits", "model=pair", "model.teacher.name=resnet8", "model.student.name=resnet8", *overrides
        )
        train_teacher(cfg, tmp_path, fit)
    assert "mean" not in found[0] or found[0].mean is None
    assert (found[1].mean, found[1].std) == ([0.5, 0.5, 0.4], [0.5, 0.5, 0.3])
    teacher = replace(make_plan(tmp_path).teacher, name="my.nets:build", weights="fit", image_size=64)
    with pytest.raises(ValueError, match=r"has its size in its name: model\.teacher\.name=my\.nets:build@64\."):
        find_teacher(teacher, "digits", TeacherStore(tmp_path))


@pytest.mark.slow
def test_teacher_trained_first_is_freed_before_its_student_is_built(tmp_path, monkeypatch, capsys):
    """Both train on mixed images, which is reported."""
    students, left = [], []

    def build(*args):
        left.extend(student() is not None for student in students)
        module = build_module(*args)
        students.append(weakref.ref(module.student))
        return module

    monkeypatch.setattr("rld_lightning.tasks.fit.build_module", build)
    networks = ("model=pair", "model.teacher.name=resnet8", "model.student.name=wrn16_1", "model.teacher.weights=fit")
    short = ("recipe=patient", "recipe.epochs=1", "trainer.max_steps=1", "data.subset=0.1", "trainer=cpu")
    paths = (f"paths.run={tmp_path / 'run'}", f"paths.teachers={tmp_path / 'teachers'}")
    cfg = compose("data=digits", "loss=rld", *networks, *short, *paths, resolve=False)
    gc.disable()  # which would clear up by itself at some time
    try:
        summary = fit(cfg)
    finally:
        gc.enable()
    assert left == [False]
    assert (summary.model, summary.teacher) == ("wrn16_1", "resnet8")
    assert capsys.readouterr().out.count("mixed  data.mixup=1: of two images and labels each") == 2
