"""Data and a file of weights that tests of several tasks begin with."""

import pytest
import torch

from rld_lightning.data import DigitsDataModule
from rld_lightning.models.factory import create_model
from rld_lightning.models.weights.save import save_weights


@pytest.fixture
def data():
    module = DigitsDataModule()
    module.setup()
    return module


@pytest.fixture
def file(tmp_path):
    """Writes the weights of a small network, with what they say about themselves."""

    def write(**facts):
        torch.manual_seed(0)
        save_weights(create_model("resnet8", 10), tmp_path / "w.safetensors", {"name": "resnet8", **facts})
        return tmp_path / "w.safetensors"

    return write
