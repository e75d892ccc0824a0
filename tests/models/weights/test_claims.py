"""Files that claim more than they hold take no memory."""

import re
import zipfile

import pytest
import torch

from rld_lightning.models.factory import create_model
from rld_lightning.models.student import load_student
from rld_lightning.models.weights.read import Weights, WeightsError, read_weights
from rld_lightning.models.weights.save import save_weights
from rld_lightning.models.weights.verify import check_fits
from rld_lightning.runs.checkpoint import read_checkpoint


def stretched(path):
    torch.save({"state_dict": {"fc.bias": torch.zeros(1).expand(1 << 40)}}, path)


def sparse(path):
    torch.save({"state_dict": {"fc.bias": torch.sparse_coo_tensor([[0]], [1.0], (1 << 40,))}}, path)


def compressed(path):
    torch.save({"a": torch.zeros(1 << 18)}, path.with_suffix(".whole"))
    with (
        zipfile.ZipFile(path.with_suffix(".whole")) as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in whole.infolist():
            small.writestr(entry.filename, whole.read(entry))


@pytest.mark.parametrize("write", [stretched, sparse, compressed])
def test_a_file_that_unpacks_to_more_than_it_holds_is_refused(tmp_path, write):
    write(tmp_path / "file.ckpt")
    with pytest.raises(WeightsError, match=r"was refused: .*(unpack|dense and contiguous)"):
        read_weights(tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        read_checkpoint(tmp_path / "file.ckpt")


def test_a_small_buffer_that_was_expanded_is_read(tmp_path):
    torch.save({"weight": torch.zeros(3), "ids": torch.arange(9).expand(4, 9)}, tmp_path / "file.pth")
    assert read_weights(tmp_path / "file.pth").state_dict["ids"].shape == (4, 9)


def test_lists_that_stand_in_each_other_have_no_text(tmp_path):
    nested = ["x"]
    for _ in range(40):
        nested = [nested] * 10
    loop = []
    loop.append(loop)
    facts = {"student": "resnet8", "deep": nested, "loop": loop, "mean": [0.5, 0.5, 0.5]}
    torch.save({"state_dict": {"w": torch.zeros(2)}, "hyper_parameters": facts}, tmp_path / "file.ckpt")
    told = {"student": "resnet8", "deep": "a list", "loop": "a list", "mean": "[0.5, 0.5, 0.5]"}
    assert read_weights(tmp_path / "file.ckpt").metadata == told


@pytest.mark.parametrize(("name", "classes"), [("resnet8", (1 << 24) - 1), ("torchvision/vit_h_14", 10)])
def test_no_network_is_made_of_a_name_alone(tmp_path, monkeypatch, name, classes):
    save_weights({"fc.bias": torch.zeros(2)}, tmp_path / "small.safetensors", {"name": name, "num_classes": classes})
    made = []
    monkeypatch.setattr("rld_lightning.models.student.create_model", lambda *_: made.append(1))
    with pytest.raises(WeightsError, match=f"does not fit the model {re.escape(name)}"):
        load_student(tmp_path / "small.safetensors")
    assert not made


@pytest.mark.parametrize("name", ["resnet8", "torchvision/regnet_y_400mf", "resnet8@32", "resnet8@resnet20"])
def test_what_fits_is_not_refused(tmp_path, name):
    save_weights(create_model(name, 10), tmp_path / "own.safetensors", {"name": name})
    check_fits(name, 10, read_weights(tmp_path / "own.safetensors"))


def test_a_network_that_asks_numpy_while_it_is_made_is_not_refused(monkeypatch):
    def make(*_):
        return torch.nn.Linear(int(torch.ones(2).numpy().sum()), 2)

    monkeypatch.setattr("rld_lightning.models.weights.verify.create_model", make)
    check_fits("resnet8", 2, Weights({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, {}, "own.pth"))


@pytest.mark.parametrize("fact", [{"image_shape": [3, 4097, 4097]}, {"resize": 8193}])
def test_a_picture_is_not_enlarged_to_whatever_a_file_says(tmp_path, fact):
    save_weights(create_model("resnet8", 10), tmp_path / "own.safetensors", {"name": "resnet8", **fact})
    with pytest.raises(WeightsError, match="about itself, which is not"):
        load_student(tmp_path / "own.safetensors", image_size=32, mean=[0.5] * 3, std=[0.5] * 3)
