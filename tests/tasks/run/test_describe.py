"""What a run says of itself."""

import pytest
from torch import nn

from rld_lightning.models.factory import create_model
from rld_lightning.tasks.run.describe import describe_size


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), "965 parameters, 960 MACs"),
        (create_model("resnet8", 10), "0.08 M parameters, 0.8 M MACs"),
    ],
)
def test_small_networks_have_a_size_too(network, said):
    assert describe_size(network, (3, 8, 8)) == said
