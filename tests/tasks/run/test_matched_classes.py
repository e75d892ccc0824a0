"""Weights are loaded in the order of the data's classes."""

import torch

from rld_lightning.models.factory import create_model
from rld_lightning.tasks.run.matched_classes import load_in_order

NAMES = [str(digit) for digit in range(10)]


def test_a_student_starts_with_its_classes_in_the_order_of_the_data(data, file, capsys):
    network = create_model("resnet8", 10)
    load_in_order(network, "resnet8", str(file(class_names=NAMES[::-1])), data, "student")
    other = create_model("resnet8", 10)
    load_in_order(other, "resnet8", str(file()), data, "student")
    torch.testing.assert_close(network.fc.weight, other.fc.weight.flip(0))
    assert "student" in capsys.readouterr().out
