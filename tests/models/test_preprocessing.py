"""Preprocessing of pictures equals that of validation, bit for bit."""

import numpy as np
import pytest
import torch
from helpers.data import ready, write_jpegs
from helpers.exports import write_digits
from PIL import Image

from rld_lightning.data import ImageFolderDataModule
from rld_lightning.models.preprocessing import PixelsToProbabilities, Preprocessing, pixels_of, preprocessing_of
from rld_lightning.models.weights.facts import WeightsFacts
from rld_lightning.models.weights.read import WeightsError

LOOK = {"mean": (0.3054,) * 3, "std": (0.3760,) * 3}


def test_pictures_of_the_input_size_are_processed_as_in_validation(tmp_path):
    paths, batch = write_digits(tmp_path / "digits")
    transform = Preprocessing((8, 8), 8, **LOOK)
    images = torch.stack([transform(path) for path in paths])
    assert torch.equal(images, batch.images)
    pixels = torch.stack([pixels_of(path) for path in paths])
    assert torch.equal(transform.denormalize(images), pixels)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    inside = PixelsToProbabilities(network, transform)(pixels.permute(0, 2, 3, 1))
    torch.testing.assert_close(inside, network(images).softmax(1))


def test_pictures_of_other_sizes_are_processed_as_in_validation(tmp_path):
    write_jpegs(tmp_path, {"train": 1, "val": 3}, size=(50, 37), ending=".jpg")
    data = ready(ImageFolderDataModule(tmp_path, image_size=16, resize=20, num_workers=0))
    transform = Preprocessing((16, 16), data.eval_resize, data.mean, data.std)
    (batch,) = data.val_dataloader()
    paths = [data.splits["test"].path(index) for index in batch.index.tolist()]
    assert torch.equal(torch.stack([transform(path) for path in paths]), batch.images)


@pytest.mark.parametrize(("size", "resize"), [((8, 8), 8), ((8, 8), 11), ((7, 10), 12)])
def test_the_preprocessing_inside_a_network_gives_the_same_images(size, resize):
    transform = Preprocessing(size, resize, **LOOK)
    inside = PixelsToProbabilities(torch.nn.Flatten(), transform, resize=True)
    generator = torch.Generator().manual_seed(0)
    for height, width in ((40, 27), (27, 41), (5, 4), (9, 200), (13, 13)):
        pixels = torch.randint(256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
        assert (inside._crop(pixels.float()) - transform.crop(pixels)).abs().max() <= 1
    cropped = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=generator)
    assert torch.equal(inside._crop(transform.pad_for_resize(cropped).float()), cropped.float())
    with pytest.raises(ValueError, match="images of 9x16 cannot be cropped from images resized to 12"):
        PixelsToProbabilities(torch.nn.Flatten(), Preprocessing((9, 16), 12, **LOOK), resize=True)


def test_files_arrays_tensors_and_images_are_the_same_picture(tmp_path):
    turned = Image.fromarray(np.random.default_rng(0).integers(256, size=(6, 9, 3), dtype=np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    from_file = pixels_of(tmp_path / "turned.png")
    assert from_file.shape == (3, 9, 6)
    assert torch.equal(pixels_of(Image.open(tmp_path / "turned.png")), from_file)
    assert torch.equal(pixels_of(from_file.permute(1, 2, 0).numpy()), from_file)
    assert torch.equal(pixels_of(from_file), from_file)
    for other in (np.zeros((4, 4), np.uint8), torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="is not supported; give a path"):
            pixels_of(other)


def test_given_values_override_the_file_s_and_those_the_library_s():
    said = WeightsFacts(image_shape=(3, 32, 32), resize=40, **LOOK)
    assert preprocessing_of(said, "resnet8", "f") == Preprocessing((32, 32), 40, **LOOK)
    given = preprocessing_of(said, "resnet8", "f", image_size=64, mean=[0.0, 0.0, 0.0], interpolation="bicubic")
    assert given == Preprocessing((64, 64), 73, (0.0, 0.0, 0.0), LOOK["std"], "bicubic")
    assert preprocessing_of(WeightsFacts(dataset="cifar100", image_shape=(3, 32, 32), **LOOK), "x", "f").resize == 32
    published = preprocessing_of(WeightsFacts(), "torchvision/resnet18", "f")
    assert (published.size, published.resize, published.mean) == ((224, 224), 256, (0.485, 0.456, 0.406))
    with pytest.raises(WeightsError, match="give image_size=, mean=, std="):
        preprocessing_of(WeightsFacts(), "resnet8", "f")
    with pytest.raises(WeightsError, match="resize=20 is less than the 32 pixels"):
        preprocessing_of(said, "resnet8", "f", resize=20)
