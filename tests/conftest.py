"""Pieces that tests of several rooms share."""

import os

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "disabled")
# Two threads fighting a busy machine for two cores are several times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_arithmetic():
    """Every test starts from the same seed and leaves no default type behind."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
