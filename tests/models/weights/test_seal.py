"""Every flipped bit in a file written by this package is detected on reading."""

import random
from io import BytesIO

import pytest
import safetensors.torch
import torch
from torch import nn

from rld_lightning.models.weights.read import WeightsError, read_metadata, read_weights
from rld_lightning.models.weights.save import save_weights
from rld_lightning.models.weights.seal import is_damaged, seal_checkpoint


def checkpoint(tmp_path, **extra):
    torch.save({"state_dict": nn.Linear(30, 20).state_dict(), **extra}, saved := BytesIO())
    path = tmp_path / "last.ckpt"
    path.write_bytes(seal_checkpoint(saved))
    return path


def export(tmp_path):
    path = tmp_path / "student.safetensors"
    save_weights(nn.Linear(30, 20), path, {"name": "linear", "top1": 71.5, "classes": ["ä", 'b"sha256":"']})
    return path


def flipped(content, bit):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return damaged


@pytest.mark.parametrize("write", [checkpoint, export])
def test_every_flipped_bit_is_detected(tmp_path, write):
    path = write(tmp_path)
    content = path.read_bytes()
    assert not is_damaged(content)
    whole = read_weights(path).state_dict
    bits = 8 * len(content)
    # Random positions, and all of both ends, where the checksum and its marks are.
    ends = [*range(8 * 600), *range(bits - 8 * 200, bits)]
    unseen = []
    for bit in {*ends, *random.Random(0).sample(range(bits), 300)}:
        if not is_damaged(damaged := flipped(content, bit)):
            path.write_bytes(damaged)
            try:
                assert torch.equal(read_weights(path).state_dict["weight"], whole["weight"])
            except WeightsError:
                continue
            unseen.append(bit)
    assert not unseen
    path.write_bytes(flipped(content, bits // 2))
    with pytest.raises(WeightsError, match=f"{path} is damaged: .*use a copy of it, or create it again"):
        read_weights(path)


@pytest.mark.parametrize("mmap", [True, False])
def test_other_readers_accept_a_sealed_checkpoint(tmp_path, mmap):
    found = torch.load(checkpoint(tmp_path, epoch=3), weights_only=True, mmap=mmap)
    assert found["epoch"] == 3
    assert found["state_dict"]["weight"].shape == (20, 30)


def test_other_readers_accept_a_sealed_export(tmp_path):
    path = export(tmp_path)
    assert safetensors.torch.load_file(path).keys() == {"weight", "bias"}
    told = {"name": "linear", "top1": "71.5", "classes": '["\\u00e4", "b\\"sha256\\":\\""]'}
    assert read_metadata(path) == read_weights(path).metadata == told


def test_equal_weights_give_identical_files(tmp_path):
    torch.manual_seed(0)
    content = export(tmp_path).read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    for _ in range(5):
        torch.manual_seed(0)
        assert export(tmp_path).read_bytes() == content


def test_files_without_a_seal_are_read_as_before(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "a.pth")
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(nn.Linear(3, 2).state_dict(), tmp_path / "c.safetensors", {"sha256": "0" * 64})
    for path in tmp_path.iterdir():
        assert not is_damaged(path.read_bytes())
        assert len(read_weights(path).sha256) == 64
