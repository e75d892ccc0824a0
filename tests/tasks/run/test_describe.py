"""The description of a run."""

import pytest
from torch import nn

from rld_lightning.losses import CombinedLoss, KDLoss, RLDLoss, loss_class
from rld_lightning.models.factory import create_model
from rld_lightning.tasks.run.describe import describe_parts, describe_size


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), "965 parameters, 960 MACs"),
        (create_model("resnet8", 10), "0.08 M parameters, 0.8 M MACs"),
    ],
)
def test_small_networks_have_a_nonzero_size(network, said):
    assert describe_size(network, (3, 8, 8)) == said


def test_divided_step_is_reported_if_it_changes_the_loss():
    sums = CombinedLoss(rld=RLDLoss(), rkd=loss_class("rkd")()), CombinedLoss(rld=RLDLoss(), kd=KDLoss())
    assert "here sees 16 images at a time: a step of 4 such batches" in describe_parts(sums[0], 4, 16)
    assert not describe_parts(sums[1], 4, 16)
    assert not describe_parts(sums[0], 1, 64)
