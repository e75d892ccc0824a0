"""A teacher's accuracy is measured before training, and doubtful results are reported."""

from types import SimpleNamespace

import pytest
import torch

from rld_lightning.data import DigitsDataModule
from rld_lightning.models.factory import create_model
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.weights.facts import WeightsFacts
from rld_lightning.tasks.teacher import score as teacher_score
from rld_lightning.tasks.teacher.score import measure_teacher

NAMES = [str(digit) for digit in range(10)]


class Oracle(torch.nn.Module):
    """Is correct for a given percentage of the images whose labels it has seen."""

    def __init__(self, data, percent):
        super().__init__()
        self.label = iter(torch.cat([batch.label for batch in data.val_sample(64)]).tolist())
        self.seen, self.percent = 0, percent

    def forward(self, images):
        logits = torch.zeros(len(images), 10)
        for row in logits:
            label = next(self.label)
            row[
                label if self.seen * self.percent // 100 < (self.seen + 1) * self.percent // 100 else (label + 1) % 10
            ] = 1
            self.seen += 1
        return logits


def measure(data, percent, **facts):
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), global_rank=0, world_size=1)
    measure_teacher(FrozenTeacher(Oracle(data, percent)), WeightsFacts(**facts), data, trainer)


OTHERWISE = "it may have been trained with another normalisation"


@pytest.mark.parametrize(
    ("percent", "recorded", "dataset", "doubt"),
    [
        (90, 90.0, "digits", None),
        (90, None, None, None),
        (80, 99.0, "digits", f"far below the 99.00 % that its file says; {OTHERWISE}"),
        (80, 99.0, "mnist", None),  # of other images
        (15, 99.0, "digits", f"far below the 99.00 % that its file says; {OTHERWISE}"),
        (15, 13.0, "digits", "near that of guessing (10.00 %); so says its file"),
        (15, None, None, f"near that of guessing (10.00 %); {OTHERWISE}"),
    ],
)
def test_teacher_is_measured_first(data, capsys, percent, recorded, dataset, doubt):
    measure(data, percent, top1=recorded, dataset=dataset)
    output = capsys.readouterr().out
    assert f"top-1 {percent:.2f} % on 360 of 360 validation images" in output
    assert ("caution" in output) == (doubt is not None)
    if doubt:
        assert f"the teacher's top-1 is {doubt}" in output


def test_warning_if_the_teacher_may_have_seen_the_held_out_images(capsys):
    data = DigitsDataModule(val_fraction=0.2, seed=1)
    data.setup()
    for facts in ({}, {"dataset": "digits"}, {"dataset": "digits", "val_fraction": 0.2, "data_seed": 0}):
        measure(data, 90, **facts)
        assert "validation images, which it may have been trained on" in capsys.readouterr().out
    measure(data, 90, dataset="digits", val_fraction=0.2, data_seed=1)
    assert "trained on" not in capsys.readouterr().out


def test_excluded_causes_are_not_suggested(data, capsys):
    measure(data, 15, mean=data.mean, std=data.std, image_shape=data.image_shape, class_names=NAMES)
    assert "it may not have been trained to the end" in capsys.readouterr().out
    measure(data, 15, mean=data.mean, std=data.std, image_shape=data.image_shape)
    assert "it may have been trained with another order of the classes" in capsys.readouterr().out


def test_sample_is_enough_and_no_random_number_is_drawn(data, capsys, monkeypatch):
    monkeypatch.setattr(teacher_score, "SECONDS", 0.0)
    state = torch.get_rng_state()
    measure(data, 90)
    assert "on 64 of 360 validation images" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state)
    first = next(iter(data.val_sample(64))).label
    assert len(first.unique()) == 10  # although folders are in the order of their classes


def test_teacher_with_nan_logits_is_refused(data):
    teacher = FrozenTeacher(create_model("resnet8", 10))
    teacher.model.fc.weight.data.fill_(torch.nan)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), global_rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"logits of digits are not numbers"):
        measure_teacher(teacher, WeightsFacts(), data, trainer)
