"""Teachers that do not fit the data are refused in one sentence."""

import pytest
from torch import nn

from rld_lightning.tasks import teacher


def test_a_pretrained_teacher_keeps_to_its_own_number_of_classes(monkeypatch):
    built = []

    def without_a_download(name, num_classes, pretrained):
        built.append((name, num_classes, pretrained))
        return nn.Linear(1, num_classes)

    monkeypatch.setattr(teacher, "create_model", without_a_download)
    teacher._pretrained("torchvision/resnet34", 1000)
    with pytest.raises(ValueError, match=r"torchvision/resnet34 knows 1,000 classes and the data has 10.*loss=ce"):
        teacher._pretrained("torchvision/resnet34", 10)
    assert built == [("torchvision/resnet34", 1000, True), ("torchvision/resnet34", 10, True)]
