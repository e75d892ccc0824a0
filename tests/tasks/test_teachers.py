"""The store of teachers as a user sees it: listed, filled, and compared with published accuracies."""

import json
import runpy
import sys

import pytest
import torch
from helpers.configs import compose
from helpers.data import write_jpegs
from helpers.scripts import SCRIPTS, run_script

from rld_lightning.errors import UserError
from rld_lightning.models import create_model
from rld_lightning.models.teacher.published import PUBLISHED, published_top1
from rld_lightning.models.teacher.teacher_store import TeacherStore
from rld_lightning.tasks import teachers
from rld_lightning.tasks.evaluate import evaluate

SCRIPT = SCRIPTS / "teachers.py"
SMALL = ("trainer=cpu", "data.eval_batch_size=512")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Returns a store with two networks for the digits, and a damaged file."""
    monkeypatch.chdir(tmp_path)
    kept = TeacherStore(tmp_path / "teachers")
    for name, top1 in (("resnet8", 50.0), ("wrn16_1", None)):
        torch.manual_seed(0)
        facts = {"num_classes": 10, **({"top1": top1} if top1 else {})}
        kept.save(create_model(name, 10), "digits", name, facts)
    damaged = kept.save(create_model("resnet14", 10), "digits", "resnet14", {})
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    return kept


def test_published_accuracies_are_found_for_every_spelling_of_a_name():
    assert published_top1("cifar100", "wrn_40_2") == published_top1("cifar100", "wrn40_2") == 75.61
    assert published_top1("cifar100", "wrn28_4") == 78.6
    assert published_top1("cifar100", "resnet8") is None
    assert published_top1("digits", "wrn40_2") is None


def test_list_has_accuracy_checksum_source_and_missing_teachers(store, capsys):
    found = {teacher.name: teacher for teacher in teachers.stored_teachers(store)}
    assert [found[name].refusal for name in ("resnet8", "wrn16_1", "resnet14")] == [
        "",
        "",
        f"{found['resnet14'].path} is damaged",
    ]
    teachers.print_teachers(store)
    lines = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert all(word in lines["digits/resnet8"] for word in ("50.00", "fit", found["resnet8"].sha256[:12]))
    assert "unusable" in lines["digits/resnet14"]
    assert "75.61" in lines["cifar100/wrn40_2"]
    assert sum("fetch gets it" in line for line in lines.values()) == len(PUBLISHED)


def test_text_from_a_file_is_not_markup(store, capsys):
    store.save(create_model("resnet8", 10), "digits", "resnet20", {"url": "[red]x[/red]\x1b[2J"})
    teachers.print_teachers(store)
    output = capsys.readouterr().out
    assert "\x1b[2J" not in output
    assert "says url='[red]x[/red]\\x1b[2J' about itself, which is not a line" in output


def measured(store, name):
    weights = store.find("digits", name)
    cfg = compose("data=digits", f"weights={weights}", "trainer=cpu", "paths.run=own", name="eval", resolve=False)
    return evaluate(cfg, classes_shown=0).top1


def test_teachers_are_measured_and_a_deviation_is_reported(store, capsys):
    top1 = measured(store, "resnet8")
    with pytest.raises(UserError) as refusal:
        teachers.verify_teachers(store, [], SMALL)
    messages = str(refusal.value).splitlines()
    assert [message.rpartition("/")[2] for message in messages] == [
        "resnet14.safetensors is damaged",
        f"resnet8.safetensors is {top1 - 50:+.2f} points off what it should be",
    ]
    assert "nothing to compare with" in capsys.readouterr().out
    written = json.loads((store.root.parent / "runs/verify/digits/resnet8/evaluation.json").read_text())
    assert written["top1"] == top1


@pytest.mark.parametrize("off", [0.05, 5.0])
def test_verify_compares_with_published_accuracies(store, monkeypatch, capsys, off):
    """Not with the accuracy recorded in a file; the exit code reports the result."""
    torch.manual_seed(0)
    facts = {"num_classes": 10, "source": "published", "top1": 99.0}
    weights = store.save(create_model("resnet8", 10), "digits", "resnet8", facts)
    top1 = measured(store, "resnet8")
    monkeypatch.setattr("rld_lightning.models.teacher.published.PUBLISHED_DATASET", "digits")
    monkeypatch.setitem(PUBLISHED, "resnet8", top1 + off)
    monkeypatch.setattr(sys, "argv", ["teachers.py", "verify", "resnet8", "--root", str(store.root), *SMALL])
    capsys.readouterr()
    if off < teachers.TOLERANCE:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    else:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert ended.value.code == 2
    output = capsys.readouterr().out
    (row,) = (line for line in output.splitlines() if "digits/resnet8" in line and "│" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:4] == ["digits/resnet8", f"{top1:.2f}", f"{top1 + off:.2f}", f"{-off:.2f}"]
    wrong = "error: " + f"{weights} is -5.00 points off what it should be"
    assert (cells[4] == "as it should be") == (off < teachers.TOLERANCE) == (wrong not in output)


@pytest.mark.parametrize("command", ["list", "verify"])
def test_a_store_that_is_missing_is_not_an_empty_one(store, monkeypatch, capsys, command):
    gone = store.root.with_name("gone")
    monkeypatch.setattr(sys, "argv", ["teachers.py", command, "--root", str(gone)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert f"error: --root {gone} is not a folder; name that of a store" in capsys.readouterr().out


@pytest.mark.slow
def test_unchanged_teacher_is_accepted(store, capsys):
    top1 = measured(store, "resnet8")
    torch.manual_seed(0)
    store.save(create_model("resnet8", 10), "digits", "resnet8", {"num_classes": 10, "top1": top1 + 0.05})
    teachers.verify_teachers(store, ["ResNet8"], [*SMALL, "data=digits"])
    assert "as it should be" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "overrides", "words"),
    [
        (["resnet9"], (), r"resnet9 is not in .*; there are resnet14, resnet8, wrn16_1\. Did you mean 'resnet8'"),
        ([], ("data=cifar100",), "holds no teacher; fetch or fit one"),
        (["resnet8"], ("data.rot=1",), "data.rot is not known"),
    ],
)
def test_teachers_that_cannot_be_measured_are_reported(store, names, overrides, words):
    with pytest.raises(UserError, match=words):
        teachers.verify_teachers(store, names, overrides)


def test_store_for_folders_of_images_needs_their_path(store):
    store.save(create_model("resnet8", 10), "photos", "resnet8", {"num_classes": 10})
    with pytest.raises(
        UserError, match="photos is not the name of a data set; say where it is, such as data=imagefolder"
    ):
        teachers.verify_teachers(store, ["resnet8"], SMALL)


def test_teachers_of_a_folder_are_measured_on_it(store, tmp_path, capsys):
    write_jpegs(tmp_path / "photos", {"train": 1, "val": 2}, size=(32, 32), ending=".jpg")
    always_a = create_model("resnet8", 3)
    torch.nn.init.zeros_(always_a.fc.weight)
    always_a.fc.bias.data = torch.tensor([1.0, 0.0, 0.0])
    store.save(always_a, "photos", "resnet8", {"num_classes": 3, "class_names": ["a", "b", "c"], "top1": 33.33})
    folder = ("data=imagefolder", f"data.root={tmp_path / 'photos'}", "data.image_size=32", "trainer=cpu")
    teachers.verify_teachers(store, [], folder)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "photos/resnet8" in line and "│" in line]
    assert line.count("33.33") == 2
    assert "as it should be" in line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("model=pair", "model.teacher.name=resnet8", "model.student.name=resnet8"),
            "is a pair; name the teacher alone",
        ),
        (("model=resnet8", "loss=ce", "data.val_fraction=0.1"), "has learned from all images: data.val_fraction=0"),
        (("model=resnet8", "loss=ce"), "resnet8.safetensors is there; move it away to train resnet8 again"),
    ],
)
def test_teacher_that_others_cannot_use_is_not_trained(store, overrides, words):
    cfg = compose("data=digits", f"paths.teachers={store.root}", f"paths.run={store.root / 'run'}", *overrides)
    with pytest.raises(UserError, match=words):
        teachers.fit_teacher(cfg)


@pytest.mark.slow
def test_teacher_is_trained_stored_and_verified(tmp_path, monkeypatch):
    """By the script, as a user does."""

    def call(*words):
        result = run_script("teachers.py", *words, folder=tmp_path, check=False)
        return result.returncode, result.stdout + result.stderr

    monkeypatch.delenv("RLD_LIGHTNING_COMMAND", raising=False)  # of runs in this process
    own = ("data=digits", "model=resnet8", "recipe=quick", "recipe.epochs=1", "trainer=cpu")
    assert call("fit", *own)[0] == 0
    assert "as it should be" in call("verify", "resnet8", "trainer=cpu")[1]
    code, output = call("fit", *own)
    assert code == 2
    assert "is there; move it away" in output
    (environment,) = tmp_path.glob("runs/digits/resnet8/ce/*/environment.json")
    assert json.loads(environment.read_text())["command"].endswith("teachers.py fit " + " ".join(own))
    code, output = call("fetch", "--url", "file:///nowhere")
    assert code == 2
    assert output.startswith("error: file:///nowhere cannot be downloaded")
