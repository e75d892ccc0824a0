"""Decompression bombs are refused without taking memory."""

import pickle
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
    with pytest.raises(ValueError, match="is not a checkpoint to resume from"):
        read_checkpoint(tmp_path / "file.ckpt")


def test_a_small_expanded_buffer_is_read(tmp_path):
    torch.save({"weight": torch.zeros(3), "ids": torch.arange(9).expand(4, 9)}, tmp_path / "file.pth")
    assert read_weights(tmp_path / "file.pth").state_dict["ids"].shape == (4, 9)


def lists_in_each_other():
    nested = ["x"]
    for _ in range(40):
        nested = [nested] * 10
    return pickle.dumps({"deep": nested}, 2)


# Dictionary keys: pairs of one pair, nested 45 times, which would be hashed for years; and tuples a million deep.
PAIRS = b"".join(b"q%ch%c\x86" % (i, i) for i in range(45))
BOMBS = {
    "a key of pairs": b"\x80\x02})" + PAIRS + b"Ns.",
    "a set of pairs": b"\x80\x02c__builtin__\nset\n](" + b")" + PAIRS + b"e\x85R.",
    "a key that is deep": b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",  # crashes Python
    "lists in each other": lists_in_each_other(),
    "lists that are filled later": b"\x80\x02]q\x00]q\x01h\x00ah\x00Na.",
    "bytes by their number": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "a slow encoding": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x08\x00\x00\x00punycode\x86R.",
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_a_pickle_that_would_hang_or_crash_its_reader_is_refused(tmp_path, content, old):
    if old:  # the format before torch 1.6: several pickles in a row
        head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        (tmp_path / "file.pth").write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + content)
    else:
        with zipfile.ZipFile(tmp_path / "file.pth", "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3")
    with pytest.raises(WeightsError, match=r"was refused: (it holds|it wants to make|it keeps)"):
        read_weights(tmp_path / "file.pth")


@pytest.mark.parametrize(("name", "classes"), [("resnet8", (1 << 24) - 1), ("torchvision/vit_h_14", 10)])
def test_no_network_is_allocated_before_its_weights_are_checked(tmp_path, monkeypatch, name, classes):
    save_weights({"fc.bias": torch.zeros(2)}, tmp_path / "small.safetensors", {"name": name, "num_classes": classes})
    made_on = []

    def make(*arguments, **options):
        made_on.append(torch.empty(0).device.type)
        return create_model(*arguments, **options)

    monkeypatch.setattr("rld_lightning.models.weights.verify.create_model", make)
    with pytest.raises(WeightsError, match=f"does not fit the model {re.escape(name)}"):
        load_student(tmp_path / "small.safetensors")
    assert set(made_on) == {"meta"}


@pytest.mark.parametrize("name", ["resnet8", "torchvision/regnet_y_400mf", "resnet8@32", "resnet8@resnet20"])
def test_weights_that_fit_are_accepted(tmp_path, name):
    save_weights(create_model(name, 10), tmp_path / "own.safetensors", {"name": name})
    check_fits(name, 10, read_weights(tmp_path / "own.safetensors"))


def test_a_network_that_uses_numpy_in_its_constructor_is_accepted(monkeypatch):
    def make(*_):
        return torch.nn.Linear(int(torch.ones(2).numpy().sum()), 2)

    monkeypatch.setattr("rld_lightning.models.weights.verify.create_model", make)
    check_fits("resnet8", 2, Weights({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, {}, "own.pth"))


@pytest.mark.parametrize("fact", [{"image_shape": [3, 4097, 4097]}, {"resize": 8193}])
def test_an_oversized_resize_in_a_file_is_refused(tmp_path, fact):
    save_weights(create_model("resnet8", 10), tmp_path / "own.safetensors", {"name": "resnet8", **fact})
    with pytest.raises(WeightsError, match="about itself, which is not"):
        load_student(tmp_path / "own.safetensors", image_size=32, mean=[0.5] * 3, std=[0.5] * 3)
