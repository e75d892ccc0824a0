"""scripts/predict.py: which images are read, the preprocessing of validation, answers in three formats."""

import csv
import io
import json
import sys
from functools import partial

import pytest
import torch
from helpers.configs import compose
from helpers.exports import digits_facts, digits_run, small_onnx, write_digits
from helpers.scripts import run_script
from PIL import Image

from rld_lightning.data.image_list import list_images
from rld_lightning.errors import UserError
from rld_lightning.models import create_model
from rld_lightning.models.weights.save import save_weights
from rld_lightning.tasks.evaluate import evaluate
from rld_lightning.tasks.predict import answer, find_images, predict

options = partial(compose, name="predict", resolve=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Returns a run, and the test images of digits as files."""
    folder = tmp_path_factory.mktemp("predict")
    network = digits_run(folder / "run")
    paths, batch = write_digits(folder / "digits")
    return folder, network, paths, batch


def ask(place, tmp_path, *overrides):
    folder = place[0]
    cfg = options(f"weights={folder / 'run'}", f"images={folder / 'digits'}", f"out={tmp_path / 'out'}", *overrides)
    broken = predict(cfg)
    return broken, (tmp_path / "out").read_text()


def test_accuracy_equals_that_of_evaluation(place, tmp_path, capsys):
    folder, network, paths, batch = place
    broken, text = ask(place, tmp_path, "format=csv", "top=3")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert (broken, [row["image"] for row in rows]) == (0, [str(path) for path in paths])
    best = network(batch.images).softmax(1).topk(3)
    assert [int(row["class_3"]) for row in rows] == best.indices[:, 2].tolist()
    assert float(rows[0]["probability_1"]) == pytest.approx(best.values[0, 0].item(), abs=1e-5)
    right = sum(int(row["class_1"]) == label for row, label in zip(rows, batch.label.tolist(), strict=True))
    weights = f"weights={folder / 'run' / 'student.safetensors'}"
    cfg = compose(weights, "data=digits", "trainer=cpu", f"paths.run={tmp_path / 'eval'}", name="eval", resolve=False)
    found = evaluate(cfg)
    assert found.images == len(rows) == 360
    assert 100 * right / len(rows) == pytest.approx(found.top1, abs=1e-4)


def test_interruption_keeps_finished_answers(place, tmp_path, monkeypatch, capsys):
    one_after_another = answer

    def interrupted(*args, **options):
        for number, found in enumerate(one_after_another(*args, **options)):
            if number == 100:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr("rld_lightning.tasks.predict.answer", interrupted)
    (tmp_path / "out").write_text("all of an earlier command")
    with pytest.raises(KeyboardInterrupt):
        ask(place, tmp_path, "format=csv")
    assert (tmp_path / "out").read_text() == "all of an earlier command"
    rows = list(csv.DictReader((tmp_path / "out.partial").open()))
    assert [row["image"] for row in rows] == [str(path) for path in place[2][:100]]
    assert "answered  100 of 360 images: " in capsys.readouterr().out


def test_unwritable_output_is_reported_before_images_are_read(place, tmp_path, monkeypatch):
    monkeypatch.setattr("rld_lightning.tasks.predict.answer", None)
    too_long = tmp_path / ("x" * 300)
    with pytest.raises(
        UserError, match=rf"^{too_long}/out cannot be read or written \(.*\): check the path and the access"
    ):
        ask(place, tmp_path, f"out={too_long / 'out'}")
    monkeypatch.setattr("rld_lightning.tasks.predict.load_classifier", None)
    (tmp_path / "file").write_text("")
    for out, told in ((tmp_path, "is a directory; name a file in it"), (tmp_path / "file" / "out", "out=")):
        with pytest.raises(UserError, match=told):
            ask(place, tmp_path, f"out={out}")


def test_broken_images_are_named_and_the_others_answered(place, tmp_path, capsys):
    _folder, _, paths, _ = place
    (tmp_path / "broken.jpg").write_bytes(b"no")
    (tmp_path / "=1+1.png").write_bytes(paths[0].read_bytes())
    broken, text = ask(place, tmp_path, f"images=[{paths[0]},{tmp_path}]", "format=jsonl", "top=20", "batch_size=1")
    first, formula, bad = map(json.loads, text.splitlines())
    assert broken == 1
    assert len(first["classes"]) == 10
    assert sum(row["probability"] for row in first["classes"]) == pytest.approx(1, abs=1e-4)
    assert formula["classes"] == first["classes"]
    assert bad["image"] == str(tmp_path / "broken.jpg")
    assert "cannot identify image file" in bad["error"]
    assert "1 of 3 images could not be read" in capsys.readouterr().out
    (tmp_path / "out").unlink()
    _, text = ask(place, tmp_path, f"images={tmp_path}", "format=table", "top=1")
    assert text.splitlines()[2].startswith(f"{tmp_path}/broken.jpg,,,")
    assert "1." in capsys.readouterr().out
    ask(place, tmp_path, "top=1", "format=table")
    said = capsys.readouterr().out  # what all files begin with stands above them, and not in each line
    assert f"images, the first 40, in {place[0]}/digits/" in said.replace("\n", " ")
    assert "│ 000.png │" in said
    with pytest.raises(UserError, match="none of the 1 images"):
        ask(place, tmp_path, f"images={tmp_path / 'broken.jpg'}")


def test_cyclic_links_are_not_followed_for_ever(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").touch()
        for link in ("a", "b"):  # each doubles all that is found, 40 times over
            (tmp_path / name / link).symlink_to(tmp_path / name)
    assert len(find_images([f"{tmp_path}/**/*.jpg"])) == len(list_images(tmp_path).labels) == 2


def test_images_are_found_in_folders_patterns_and_lists(tmp_path, monkeypatch):
    for name in ("b/2.jpg", "b/1.PNG", "b/.hidden/3.jpg", "b/._2.jpg", "b/note.txt", "a[1].jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert find_images(["b"]) == ["b/1.PNG", "b/2.jpg"]
    assert find_images(["**/*.jpg", "b/2.jpg"]) == ["a[1].jpg", "b/2.jpg"]
    assert find_images(["a[1].jpg"]) == ["a[1].jpg"]
    lines = b"b/2.jpg\r\n\nnot there.jpg\n\xff.jpg\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert find_images(["-"]) == ["b/2.jpg", "not there.jpg", "\udcff.jpg"]
    for wrong in ("nothing", "*.gif"):
        with pytest.raises(FileNotFoundError, match="there is no such file or folder, and nothing matches it"):
            find_images([wrong])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no image in it"):
        find_images(["empty"])


@pytest.mark.parametrize("pixels", [False, True])
def test_onnx_answers_match_its_logits(place, tmp_path, pixels):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    facts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in digits_facts("linear").items()}
    content, weights = small_onnx(facts, pixels=pixels)
    (tmp_path / "m.onnx").write_bytes(content)
    _, text = ask(place, tmp_path, f"weights={tmp_path / 'm.onnx'}", "format=csv", "top=1")
    _folder, _, paths, batch = place
    raw = torch.stack([torch.from_numpy(__import__("numpy").array(Image.open(path))) for path in paths]).float()
    logits = raw.flatten(1) @ weights if pixels else batch.images.flatten(1) @ weights
    found = [int(row["class_1"]) for row in csv.DictReader(io.StringIO(text))]
    assert found == logits.argmax(1).tolist()


def test_class_names_are_one_for_each_logit(place, tmp_path):
    with pytest.raises(UserError, match="has 10 classes, and there are 2 class names"):
        ask(place, tmp_path, "class_names=[a,b]")
    with pytest.raises(UserError, match=r"there is no file at /gone\.txt, which class_names= names"):
        ask(place, tmp_path, "class_names=/gone.txt")


def test_network_whose_output_is_no_number_is_refused(place, tmp_path):
    network = create_model("resnet8", 10)
    torch.nn.init.constant_(network.fc.bias, torch.nan)
    save_weights(network, tmp_path / "nan.safetensors", digits_facts("resnet8"))
    with pytest.raises(UserError, match=r"resnet8 has no numbers for .*/digits/.*: check how its weights were trained"):
        ask(place, tmp_path, f"weights={tmp_path / 'nan.safetensors'}")


def test_missing_facts_of_a_foreign_file_are_requested(place, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (tmp_path / "m.onnx").write_bytes(small_onnx({})[0])
    weights = f"weights={tmp_path / 'm.onnx'}"
    with pytest.raises(UserError, match=r"does not say how images are sized or normalised; give mean=, std="):
        ask(place, tmp_path, weights)
    look = ("mean=[0.5,0.5,0.5]", "std=[0.5,0.5,0.5]", "resize=8")
    with pytest.raises(UserError, match="has 10 classes, and there are 2 class names"):
        ask(place, tmp_path, weights, *look, "class_names=[a,b]")
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"))
    _, text = ask(place, tmp_path, weights, *look, f"class_names={tmp_path / 'names.txt'}", "top=1")
    assert {row["class_1"] for row in csv.DictReader(io.StringIO(text))} <= set("abcdefghij")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_missing_device_is_reported(place, tmp_path, monkeypatch, device):
    for backend in ("torch.cuda", "torch.backends.mps"):
        monkeypatch.setattr(f"{backend}.is_available", lambda: False)
    with pytest.raises(UserError, match=f"device={device} is not there; choose device=cpu"):
        ask(place, tmp_path, f"device={device}")


@pytest.mark.slow
def test_standard_output_contains_only_answers(place, tmp_path):
    folder, _, paths, _ = place
    options = (f"weights={folder / 'run'}", "images=-", "format=jsonl", "out=-", "top=1")
    listed = f"{paths[0]}\n{tmp_path / 'missing.jpg'}\n"
    done = run_script("predict.py", *options, folder=tmp_path, check=False, input=listed)
    assert done.returncode == 3, done.stderr
    answered, missing = map(json.loads, done.stdout.splitlines())
    assert (answered["image"], missing["image"]) == (str(paths[0]), str(tmp_path / "missing.jpg"))
    assert "No such file" in missing["error"]
    assert "1 of 2 images could not be read" in done.stderr
