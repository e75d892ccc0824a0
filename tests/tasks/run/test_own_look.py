"""A run's networks are fed as they were trained, the teacher is measured first, and what is doubtful is said."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.plans import make_plan

from rld_lightning.data import DigitsDataModule
from rld_lightning.models.factory import create_model
from rld_lightning.models.normalisation import Look
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.weights.facts import WeightsFacts
from rld_lightning.models.weights.save import save_weights
from rld_lightning.tasks.run.own_look import adopt_look, load_in_order
from rld_lightning.tasks.run.plan import Student
from rld_lightning.tasks.teacher import score as teacher_score
from rld_lightning.tasks.teacher.score import measure_teacher
from rld_lightning.tasks.teacher.weights import build_teacher

NAMES = [str(digit) for digit in range(10)]
HALVES = Look((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


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


def teacher_of(tmp_path, path, **values):
    return replace(make_plan(tmp_path).teacher, name="resnet8", weights=str(path), **values)


def halves(data):
    data.normalize_with(*HALVES)
    return next(iter(data.val_dataloader())).images


def build(tmp_path, path, data, **values):
    usual = Look(data.mean, data.std)
    return build_teacher(teacher_of(tmp_path, path, **values), data, usual)[0]


@pytest.mark.parametrize("said_by", ["file", "hand"])
def test_a_teacher_is_fed_as_it_was_trained(tmp_path, data, file, capsys, said_by):
    images = next(iter(data.val_dataloader())).images
    plain, _ = build(tmp_path, file(), data)(images)
    assert "sees images" not in capsys.readouterr().out
    facts = {"mean": [0.5] * 3, "std": [0.5] * 3} if said_by == "file" else {"mean": [0.1] * 3, "std": [0.1] * 3}
    teacher = build(tmp_path, file(**facts), data, look=None if said_by == "file" else HALVES)
    own, _ = teacher(images)
    said = "its file says so" if said_by == "file" else "model.teacher.mean and std"
    output = capsys.readouterr().out
    assert f"its own mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5] ({said})" in output
    expected = teacher.model(halves(data))
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    assert (own - plain).abs().max() > 0.01


def test_classes_of_a_teacher_are_matched_by_name(tmp_path, data, file, capsys):
    images = next(iter(data.val_dataloader())).images
    expected, _ = build(tmp_path, file(class_names=NAMES), data)(images)
    turned, _ = build(tmp_path, file(class_names=NAMES[::-1]), data)(images)
    torch.testing.assert_close(turned, expected.flip(1))
    said = "its classes are matched to those of digits by name (class 0 is '9' there and '0' here)"
    assert capsys.readouterr().out.count(said) == 1
    with pytest.raises(
        ValueError, match=r"other classes.*class 0 is 'owl' there and '0' here.*model\.teacher\.weights="
    ):
        build(tmp_path, file(class_names=["owl", *NAMES[1:]]), data)


def test_images_have_the_size_that_a_teacher_was_trained_with(tmp_path, data, file, capsys):
    assert build(tmp_path, file(image_shape=[3, 8, 8]), data).relook is None
    for own, size in (("auto", 32), (16, 16)):
        assert build(tmp_path, file(image_shape=[3, 32, 32]), data, image_size=own).relook.size == (size, size)
        said = f"sees images of {size}x{size}, made of those of 8x8"
        assert said in " ".join(capsys.readouterr().out.split())
    assert build(tmp_path, file(image_shape=[3, 32, 32]), data, image_size=None).relook is None


def test_the_data_are_normalised_as_the_weights_of_the_student_want_it(data, file, capsys):
    usual = Look(data.mean, data.std)
    assert adopt_look(Student("resnet8", None, True), data, chosen=False) == usual == Look(data.mean, data.std)
    student = Student("resnet8", str(file(mean=[0.5] * 3, std=[0.5] * 3)), True)
    assert adopt_look(student, data, chosen=True) == usual == Look(data.mean, data.std)
    assert "caution" in capsys.readouterr().out
    before = next(iter(data.val_dataloader())).images
    assert adopt_look(student, data, chosen=False) == usual
    assert Look(data.mean, data.std) == HALVES
    pixels = before * usual.std[0] + usual.mean[0]
    torch.testing.assert_close(next(iter(data.train_dataloader())).images.min(), torch.tensor(-1.0))
    torch.testing.assert_close(next(iter(data.val_dataloader())).images, (pixels - 0.5) / 0.5)


class Oracle(torch.nn.Module):
    """Is right about the first so many percent of the images that it has seen the labels of."""

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
def test_a_teacher_is_measured_first(data, capsys, percent, recorded, dataset, doubt):
    measure(data, percent, top1=recorded, dataset=dataset)
    output = capsys.readouterr().out
    assert f"top-1 {percent:.2f} % on 360 of 360 validation images" in output
    assert ("caution" in output) == (doubt is not None)
    if doubt:
        assert f"the teacher's top-1 is {doubt}" in output


def test_a_teacher_may_know_the_images_that_are_held_out_of_its_students(capsys):
    data = DigitsDataModule(val_fraction=0.2, seed=1)
    data.setup()
    for facts in ({}, {"dataset": "digits"}, {"dataset": "digits", "val_fraction": 0.2, "data_seed": 0}):
        measure(data, 90, **facts)
        assert "validation images, which it may have been trained on" in capsys.readouterr().out
    measure(data, 90, dataset="digits", val_fraction=0.2, data_seed=1)
    assert "trained on" not in capsys.readouterr().out


def test_what_is_known_of_a_teacher_is_no_cause_of_its_failure(data, capsys):
    measure(data, 15, mean=data.mean, std=data.std, image_shape=data.image_shape, class_names=NAMES)
    assert "it may not have been trained to the end" in capsys.readouterr().out
    measure(data, 15, mean=data.mean, std=data.std, image_shape=data.image_shape)
    assert "it may have been trained with another order of the classes" in capsys.readouterr().out


def test_a_part_of_the_images_is_enough_and_no_random_number_is_drawn(data, capsys, monkeypatch):
    monkeypatch.setattr(teacher_score, "SECONDS", 0.0)
    state = torch.get_rng_state()
    measure(data, 90)
    assert "on 64 of 360 validation images" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state)
    first = next(iter(data.val_sample(64))).label
    assert len(first.unique()) == 10  # although folders are in the order of their classes


def test_a_teacher_whose_logits_are_no_numbers_is_refused(data):
    teacher = FrozenTeacher(create_model("resnet8", 10))
    teacher.model.fc.weight.data.fill_(torch.nan)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), global_rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"logits of digits are not numbers"):
        measure_teacher(teacher, WeightsFacts(), data, trainer)


def test_a_student_starts_with_its_classes_in_the_order_of_the_data(data, file, capsys):
    network = create_model("resnet8", 10)
    load_in_order(network, "resnet8", str(file(class_names=NAMES[::-1])), data, "student")
    other = create_model("resnet8", 10)
    load_in_order(other, "resnet8", str(file()), data, "student")
    torch.testing.assert_close(network.fc.weight, other.fc.weight.flip(0))
    assert "student" in capsys.readouterr().out
