"""Loading a trained network from runs, exports and files."""

import io
import json
import pickle
import zipfile

import pytest
import torch
from helpers.exports import digits_facts, digits_run, write_digits

import rld_lightning
from rld_lightning.models import create_model
from rld_lightning.models.student import load_student
from rld_lightning.models.weights.read import WeightsError
from rld_lightning.models.weights.save import save_weights


@pytest.fixture
def run(tmp_path):
    return digits_run(tmp_path / "run"), tmp_path / "run"


def test_runs_files_and_checkpoints_hold_the_same_student(run, tmp_path):
    network, folder = run
    settings = {"student": "resnet8", "dataset": "digits", "mean": [0.3054] * 3}
    checkpoint = {f"student.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": checkpoint, "hyper_parameters": settings}, folder / "last.ckpt")
    images = torch.randn(4, 3, 8, 8)
    for path in (folder, str(folder / "student.safetensors"), folder / "last.ckpt"):
        student = rld_lightning.load_student(path)
        assert student.classes == list("0123456789")
        assert student.transform.size == (8, 8)
        assert not student.training
        assert torch.equal(student(images), network(images))


def test_classes_of_pictures_are_predicted(run, tmp_path):
    network, folder = run
    paths, batch = write_digits(tmp_path / "digits")
    found = load_student(folder).predict(*paths[:5], top=3)
    best = network(batch.images[:5]).softmax(1).topk(3)
    assert [[int(name) for name, _ in row] for row in found] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor([[p for _, p in row] for row in found]), best.values)
    assert load_student(folder).predict() == []


def test_arguments_supply_missing_metadata(tmp_path):
    network = create_model("resnet8", 7).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not say which model it is of; give name="):
        load_student(tmp_path / "w.pth")
    look = {"image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    student = load_student(tmp_path / "w.pth", name="resnet8", **look)
    assert student.classes == [str(index) for index in range(7)]
    assert student.transform.size == (16, 16)
    assert load_student(tmp_path / "w.pth", name="resnet8", class_names="abcdefg", **look).classes == list("abcdefg")


def test_a_network_named_by_a_file_is_not_imported(tmp_path):
    save_weights(create_model("resnet8", 10), tmp_path / "w.safetensors", digits_facts("os:system"))
    with pytest.raises(ValueError, match="'os:system' is an external network, named by a file and not by you"):
        load_student(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="is a program with weights in it"):
        load_student(tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError, match=r"holds neither student\.safetensors"):
        load_student(tmp_path)


class _Opens:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("ending", [".pt2", ".pt", ".pth", ".ckpt", ".safetensors"])
def test_torch_export_programs_are_not_run_whatever_their_file_name(tmp_path, ending):
    """Such an archive declares which of its weights are pickled, and PyTorch unpickles them."""
    pickled = io.BytesIO()
    torch.save(_Opens(tmp_path / "was_run"), pickled)
    weight = {"path_name": "weight_0", "is_param": True, "use_pickle": True, "tensor_meta": None}
    with zipfile.ZipFile(file := tmp_path / f"model{ending}", "w") as archive:
        archive.writestr("archive/data/weights/model_weights_config.json", json.dumps({"config": {"weight": weight}}))
        archive.writestr("archive/data/weights/weight_0", pickled.getvalue())
        archive.writestr("archive/data.pkl", pickle.dumps(_Opens(tmp_path / "was_run")))
        archive.writestr("archive/archive_format", "pt2")
    match = "torch.export.load runs whatever is in one; give the export's folder" if ending == ".pt2" else None
    with pytest.raises(WeightsError, match=match):
        load_student(file, name="resnet8", class_names="abc", image_size=8, mean=[0.5] * 3, std=[0.5] * 3)
    assert not (tmp_path / "was_run").exists()


def test_folders_in_timm_s_format_are_read(tmp_path):
    timm = pytest.importorskip("timm")
    network = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    save_weights(network, tmp_path / "model.safetensors")
    config = {"architecture": "mobilenetv3_small_050", "num_classes": 3, "label_names": ["a", "b", "c"]}
    look = {"input_size": [3, 64, 64], "crop_pct": 0.8, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.2] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": look}))
    student = load_student(tmp_path)
    assert (student.name, student.classes) == ("timm/mobilenetv3_small_050", ["a", "b", "c"])
    assert student.transform.describe().startswith("shorter side to 80 (bicubic), centre 64x64, mean [0.5")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(student(images), network(images))
    for wrong, reason in ((look | {"std": [0, 1, 1]}, "says std="), (look | {"interpolation": "random"}, "bicubic")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": wrong}))
        with pytest.raises(WeightsError, match=reason):
            load_student(tmp_path)
    for content in (
        b"[1]",
        b"\xff" * 5000,
        json.dumps(config | {"pretrained_cfg": look | {"crop_pct": 1e-320}}).encode(),
    ):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(WeightsError, match=r"is not the configuration of an image classifier \(.{10,200}\)$"):
            load_student(tmp_path)


def test_size_of_images_that_the_network_cannot_take_is_refused(tmp_path):
    facts = {"name": "vgg8", "num_classes": 3, "image_shape": [3, 4, 4], "mean": [0.5] * 3, "std": [0.5] * 3}
    save_weights(create_model("vgg8", 3), tmp_path / "a.safetensors", facts)
    with pytest.raises(WeightsError, match=r"a\.safetensors: vgg8 cannot take images of 4x4 \(.*\); give image_size"):
        load_student(tmp_path / "a.safetensors")
    assert load_student(tmp_path / "a.safetensors", image_size=32).transform.size == (32, 32)
