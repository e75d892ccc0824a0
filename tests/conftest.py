"""Pieces that tests of several rooms share."""

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

os.environ.setdefault("WANDB_MODE", "disabled")


@pytest.fixture(autouse=True)
def _same_arithmetic():
    """No test leaves its seed, threads or default type to the next one."""
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
