"""Published numbers: found by our names, each with its source."""

from pathlib import Path

import pytest

from rld_lightning.reporting.paper import METHODS, TEACHER, published_for_pair, published_numbers, published_top1

REPOSITORY = Path(__file__).parents[2]


def top1(dataset, teacher, student, method, **options):
    return published_top1(published_for_pair(dataset, teacher, student), method, **options)


@pytest.mark.parametrize(
    ("dataset", "teacher", "student", "method", "value", "second_hand"),
    [
        ("cifar100", "wrn_40_2", "wrn_16_2", "rld", 76.02, True),
        ("cifar100", "wrn_40_2", "wrn_16_2", "kd", 74.92, False),
        ("cifar100", "wrn_40_2", "wrn_16_2", "ce", 73.26, False),
        ("cifar100", "wrn_40_2", "wrn_16_2", TEACHER, 75.61, False),
        ("cifar100", "resnet32x4", "resnet8x4", "rld_scd", 73.55, True),
        ("cifar100", "ResNet50", "MobileNetV2", "dkd", 70.35, False),
        ("imagenet", "torchvision/resnet34", "torchvision/resnet18", "rld", 71.91, True),
        ("imagenet", "torchvision/resnet50", "MobileNetV1", TEACHER, 76.16, False),
    ],
)
def test_our_names_find_the_published_number(dataset, teacher, student, method, value, second_hand):
    first = top1(dataset, teacher, student, method)[0]
    assert (first.value, first.second_hand) == (value, second_hand)
    assert first.source


def test_standardized_logits_are_another_method():
    pair = ("cifar100", "resnet32x4", "resnet8x4")
    assert top1(*pair, "mlkd")[0].value == 77.08
    assert top1(*pair, "mlkd", standardized=True)[0].value == 78.28
    assert top1(*pair, "kd_ls", standardized=True)[0].value == top1(*pair, "kd_ls")[0].value == 76.62


def test_nothing_where_nothing_is_published():
    assert published_for_pair("cifar100", "resnet20", "resnet8") == []
    assert published_for_pair("digits", "wrn_40_2", "wrn_16_2") == []
    assert published_for_pair("imagenet", "timm/resnet34", "torchvision/resnet18") == []  # other weights
    assert top1("cifar100", "wrn_40_2", "wrn_16_2", "rld_reference") == []


def test_every_number_has_a_source_and_every_name_a_number():
    numbers = published_numbers()
    assert len(numbers) == 1000
    assert all(number.source and number.source_key for number in numbers)
    assert set(METHODS.values()) <= {number.method for number in numbers}
    options = {path.stem for path in (REPOSITORY / "conf" / "loss").glob("*.yaml")}
    assert {method for method in METHODS if "+" not in method} <= options
