"""Names of runs."""

import pytest

from rld_lightning.runs.naming import dataset_name


@pytest.mark.parametrize(
    ("choice", "data", "name"),
    [
        ("cifar100", {"_target_": "rld_lightning.data.CIFAR100DataModule", "root": "data/cifar100"}, "cifar100"),
        (None, {"_target_": "rld_lightning.data.DigitsDataModule"}, "digits"),
        ("imagefolder", {"root": "/home/me/photos/"}, "photos"),
        ("imagefolder", {"root": "/home/me/photos", "name": "birds"}, "birds"),
        ("shards", {"root": "s3://bucket/food/"}, "food"),
        ("imagenet", {"root": "/data/ilsvrc", "name": None}, "imagenet"),
    ],
)
def test_data_set_is_named_after_its_option_or_folder(choice, data, name):
    assert dataset_name(choice, data) == name
