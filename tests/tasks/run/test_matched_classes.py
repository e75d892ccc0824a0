"""Loaded weights are in the order of the data's classes."""

import pytest
import torch

from rld_lightning.models.factory import create_model
from rld_lightning.models.weights.companion_files import find_weights
from rld_lightning.models.weights.verify import create_fitting
from rld_lightning.tasks.run.matched_classes import reorder_to_data

NAMES = [str(digit) for digit in range(10)]


def test_student_starts_with_classes_in_the_order_of_the_data(data, file, capsys):
    network, weights = create_fitting("resnet8", 10, find_weights(file(class_names=NAMES[::-1])))
    reorder_to_data(network, "resnet8", weights, data, "student")
    other, weights = create_fitting("resnet8", 10, find_weights(file()))
    reorder_to_data(other, "resnet8", weights, data, "student")
    torch.testing.assert_close(network.fc.weight, other.fc.weight.flip(0))
    assert "student" in capsys.readouterr().out


def test_other_classes_than_those_of_the_data_are_refused(data, file):
    weights = find_weights(file(class_names=["ten", *NAMES[1:]]))
    told = r"other classes than those of digits \(class 0 is 'ten' there and '0' here\); move it away, or name another"
    with pytest.raises(ValueError, match=told):
        reorder_to_data(create_model("resnet8", 10), "resnet8", weights, data, "student")
