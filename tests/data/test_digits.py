import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from rld_lightning.data import DigitsDataModule


def split_of(train, **options):
    return DigitsDataModule(**options).read_split(train=train)


def test_sizes_and_classes():
    data = DigitsDataModule()
    data.prepare_data()
    data.setup()
    assert (data.train_size, data.test_size, data.num_classes) == (1437, 360, 10)
    assert data.class_names == list("0123456789")
    assert not any(data.train_dataloader().split.images[:, 0].flatten())  # padded by one pixel


def test_mean_and_std_are_those_of_the_training_part():
    values = split_of(train=True)[0].double() / 255
    assert DigitsDataModule.mean == (round(values.mean().item(), 4),) * 3
    assert DigitsDataModule.std == (round(values.std(correction=0).item(), 4),) * 3


def test_splits_are_disjoint_complete_stratified_and_independent_of_the_seed():
    (train, train_labels), (test, test_labels) = split_of(True, seed=1), split_of(False, seed=2)
    ours = np.concatenate([train, test])[..., 0]
    theirs = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))
    share = torch.bincount(test_labels) / torch.bincount(torch.cat([train_labels, test_labels]))
    assert torch.allclose(share, torch.full((10,), 0.2), atol=0.01)
    assert torch.equal(test, split_of(False, seed=3)[0])


def test_images_are_grey_and_use_the_full_range():
    images, labels = split_of(train=True)
    assert images.shape == (1437, 8, 8, 3)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert (images[..., :1] == images).all()
    assert (images.min(), images.max()) == (0, 255)


def test_resized_images_show_the_same_digits():
    small, labels = split_of(train=False)
    large, large_labels = split_of(train=False, image_size=32)
    assert large.shape == (360, 32, 32, 3)
    assert torch.equal(labels, large_labels)
    means = [images.float().mean(dim=(1, 2, 3)) for images in (small, large)]
    assert torch.corrcoef(torch.stack(means))[0, 1] > 0.99
    data = DigitsDataModule(image_size=32)
    data.setup()
    assert next(iter(data.train_dataloader())).images.shape == (64, 3, 32, 32)


def test_digits_are_not_mirrored_by_default():
    assert not DigitsDataModule().flip
    assert DigitsDataModule(flip=True).flip


def test_size_must_be_positive():
    with pytest.raises(ValueError, match="image_size=0 must be positive"):
        DigitsDataModule(image_size=0)
