"""Each network gets images with the normalisation of its training, and its classes in the data's order."""

import pytest
import torch
from torch import nn

from rld_lightning.models.classes import class_order, reorder_classes
from rld_lightning.models.factory import create_model
from rld_lightning.models.normalisation import (
    Normalisation,
    Renormalise,
    make_renormalise,
    parse_normalisation,
    published_normalisation,
    stored_normalisation,
)
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.weights.facts import WeightsFacts

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OTHER = Normalisation((0.5, 0.4, 0.3), (0.5, 0.25, 1.0))


def pixels():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def normalized(look):
    mean, std = (torch.tensor(values)[:, None, None] for values in look)
    return (pixels() - mean) / std


def test_images_are_renormalised_up_to_rounding():
    torch.testing.assert_close(Renormalise(IMAGENET, OTHER)(normalized(IMAGENET)), normalized(OTHER), rtol=0, atol=2e-6)
    assert Renormalise(IMAGENET, OTHER)(normalized(IMAGENET).bfloat16()).dtype is torch.float32
    assert not Renormalise(IMAGENET, OTHER).state_dict()
    images = normalized(IMAGENET).contiguous(memory_format=torch.channels_last)
    assert Renormalise(IMAGENET, OTHER)(images).is_contiguous(memory_format=torch.channels_last)
    assert make_renormalise(IMAGENET, IMAGENET) is None
    assert make_renormalise(IMAGENET, None) is None


@pytest.mark.parametrize("dtype", [None, "float32", "float64"])
def test_a_teacher_gets_its_own_normalisation(dtype):
    network = create_model("resnet8", 10).eval()
    with torch.no_grad():
        expected = network(normalized(OTHER))
    teacher = FrozenTeacher(network, dtype=dtype, renormalise=make_renormalise(IMAGENET, OTHER))
    torch.testing.assert_close(teacher(normalized(IMAGENET))[0].float(), expected, rtol=1e-4, atol=1e-5)
    assert {tensor.device.type for tensor in teacher.to("meta").buffers()} == {"meta"}


def test_normalisation_published_by_a_library_and_stored_in_a_file():
    assert published_normalisation("timm/vit_tiny_patch16_224") == Normalisation((0.5,) * 3, (0.5,) * 3)
    assert published_normalisation("torchvision/resnet34") == IMAGENET
    assert published_normalisation("torchvision/efficientnet_v2_l") == Normalisation((0.5,) * 3, (0.5,) * 3)
    assert published_normalisation("wrn40_2") is None
    assert stored_normalisation(WeightsFacts(mean=OTHER.mean, std=OTHER.std)) == OTHER
    assert stored_normalisation(WeightsFacts(mean=OTHER.mean)) is None


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([0.5] * 3, None), (None, [0.5] * 3), ([0.5] * 2, [0.5] * 3), ([0.5] * 3, [0.5, 0.5, 0.0]), (0.5, 0.5),
        ("abc", [0.5] * 3), (["a", "b", "c"], [0.5] * 3), ([True] * 3, [0.5] * 3),
    ],
    ids=str,
)  # fmt: skip
def test_mean_and_std_must_be_three_numbers_each(mean, std):
    with pytest.raises(ValueError, match=r"model\.teacher\.mean=.*must be three numbers each"):
        parse_normalisation(mean, std)


def test_given_mean_and_std():
    assert parse_normalisation([0.5, 0.4, 0.3], [0.5, 0.25, 1]) == OTHER
    assert parse_normalisation(None, None) is None


def test_classes_are_matched_only_if_the_sets_of_names_are_equal():
    assert class_order(["a", "b", "c"], ["c", "a", "b"]) == [2, 0, 1]
    assert class_order(["a", "b"], ["a", "c"]) is None
    assert class_order(["a", "b", "c"], ["a", "b"]) is None
    assert class_order(["a", "a"], ["a", "a"]) is None


@pytest.mark.parametrize(
    "name", ["resnet8", "resnet8@resnet32x4", "torchvision/squeezenet1_1", "torchvision/regnet_y_400mf"]
)
def test_classes_are_reordered(name):
    torch.manual_seed(0)
    network = create_model(name, 5).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that a fresh network's logits differ between images
            module.running_var.fill_(0.1)
    images = torch.randn(2, 3, 32, 32)
    order = [3, 0, 4, 1, 2]
    with torch.no_grad():
        before = network(images)
        reorder_classes(network, name, order)
        torch.testing.assert_close(network(images), before[:, order])
    assert before.std(1).min() > 0
