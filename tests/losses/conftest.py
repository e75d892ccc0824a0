import pytest
import torch

# Their assertions are then explained on failure like those in test files.


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small only wait for a second thread."""
    torch.set_num_threads(1)
