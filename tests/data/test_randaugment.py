"""Comparison with Pillow, image by image, because the public code of MLKD uses it for its strong view."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from rld_lightning.data import randaugment
from rld_lightning.data.randaugment import (
    ADJUSTMENTS,
    FIRST_MOVE,
    MAGNITUDES,
    OPERATIONS,
    RandAugment,
    RandAugmentDraw,
    cutout,
    draw_randaugment,
    fixed_point_moves,
    move,
    randaugment_image,
)


def affine(image, *coefficients):
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


PILLOW = {
    "identity": lambda image, v: image,
    "autocontrast": lambda image, v: ImageOps.autocontrast(image),
    "equalize": lambda image, v: ImageOps.equalize(image),
    "posterize": lambda image, v: ImageOps.posterize(image, int(v)),
    "solarize": lambda image, v: ImageOps.solarize(image, v),
    "brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "rotate": lambda image, v: image.rotate(v),
    "shear_x": lambda image, v: affine(image, 1, v, 0, 0, 1, 0),
    "shear_y": lambda image, v: affine(image, 1, 0, 0, v, 1, 0),
    "translate_x": lambda image, v: affine(image, 1, 0, v * image.size[0], 0, 1, 0),
    "translate_y": lambda image, v: affine(image, 1, 0, 0, 0, 1, v * image.size[1]),
}


def by_pillow(name, pixels, magnitude):
    return torch.from_numpy(np.array(PILLOW[name](Image.fromarray(pixels.numpy()), magnitude)))


def random_images(size, height, width, seed=0):
    """Noise of the full range, of a different range for each channel, and of one value."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(size, height, width, 3, generator=generator)
    low = torch.randint(200, (size, 1, 1, 3), generator=generator)
    span = torch.randint(256, (size, 1, 1, 3), generator=generator) % (256 - low)
    images = (low + span * noise).byte()
    images[::2] = (256 * noise[::2]).byte()
    images[-1] = images[-1, 0, 0]
    return images


def random_magnitudes(name, size, seed=1):
    """Uniform magnitudes and both ends of the range (without 8 bits and threshold 256, which would do nothing)."""
    low, high = MAGNITUDES[name]
    magnitude = low + (high - low) * torch.rand(size, generator=torch.Generator().manual_seed(seed))
    magnitude[:2] = torch.tensor([low, high])
    return magnitude


def apply(name, images, magnitude):
    """Applies one operation to a batch."""
    size, height, width, _ = images.shape
    operation = torch.full((size,), OPERATIONS.index(name))
    if name in OPERATIONS[FIRST_MOVE:]:
        return move(images, fixed_point_moves(operation, magnitude, height, width))
    return ADJUSTMENTS[OPERATIONS.index(name) - 1](images, magnitude[:, None, None, None])


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (17, 30), (2, 3), (96, 64)])
@pytest.mark.parametrize("name", OPERATIONS[1:])
def test_every_operation_equals_pillows(name, height, width):
    images = random_images(40, height, width)
    magnitude = random_magnitudes(name, 40)
    actual = apply(name, images, magnitude)
    expected = torch.stack([by_pillow(name, *of) for of in zip(images, magnitude.tolist(), strict=True)])
    assert actual.dtype == torch.uint8
    assert torch.equal(actual, expected)


def test_autocontrast_equals_pillows_for_every_lowest_and_highest_value():
    low, high = torch.triu_indices(256, 256, offset=1)
    images = torch.maximum(torch.arange(256), low[:, None]).minimum(high[:, None]).byte()
    actual = apply("autocontrast", images.view(-1, 3, 256).permute(0, 2, 1).unsqueeze(1).contiguous(), torch.zeros(1))
    actual = actual.squeeze(1).permute(0, 2, 1).reshape(-1, 256)
    scale = 255.0 / (high - low).numpy()[:, None]
    pillow = (images.numpy() * scale + -low.numpy()[:, None] * scale).astype(int).clip(0, 255)
    assert (actual.numpy() == pillow).all()
    exact = (images.long() - low[:, None]) * 255 // (high - low)[:, None]
    assert (actual != exact).any()  # due to rounding of floats


def test_constant_images_are_not_stretched_or_equalized():
    flat = torch.full((1, 4, 4, 3), 77, dtype=torch.uint8)
    for name in ("autocontrast", "equalize"):
        assert torch.equal(apply(name, flat, torch.zeros(1)), flat)


def test_cutout_is_pillows_rectangle():
    images = random_images(200, 32, 24)
    hole = draw_randaugment(200, 32, 24, torch.Generator().manual_seed(0)).hole
    expected = []
    for pixels, (top, bottom, left, right) in zip(images, hole.tolist(), strict=True):
        image = Image.fromarray(pixels.numpy())
        ImageDraw.Draw(image).rectangle((left, top, right, bottom), randaugment.HOLE_COLOR)
        expected.append(torch.from_numpy(np.array(image)))
    filling = torch.tensor(randaugment.HOLE_COLOR, dtype=torch.uint8).repeat(24)
    assert torch.equal(cutout(images, hole, filling), torch.stack(expected))


def test_holes_equal_the_reference():
    """Up to half the width, around a uniform centre; both corners are clipped to the image."""
    size, height, width = 4000, 40, 20
    hole = draw_randaugment(size, height, width, torch.Generator().manual_seed(3)).hole
    generator = torch.Generator().manual_seed(3)
    torch.randint(14, (size, 2), generator=generator)
    uniform = torch.rand(size, 5, generator=generator, dtype=torch.float64).tolist()
    for (top, bottom, left, right), (_, _, share, y, x) in zip(hole.tolist(), uniform, strict=True):
        side = 0.5 * share * width
        y0, x0 = int(max(0, y * height - side / 2)), int(max(0, x * width - side / 2))
        y1, x1 = min(height, y0 + side), min(width, x0 + side)
        assert (top, bottom, left, right) == (y0, int(y1), x0, int(x1))


def test_draws_are_uniform():
    size = 70_000
    draw = draw_randaugment(size, 32, 32, torch.Generator().manual_seed(0))
    pairs = torch.bincount(draw.operation[:, 0] * 14 + draw.operation[:, 1], minlength=14**2)
    chi_square = ((pairs - size / 14**2) ** 2 / (size / 14**2)).sum().item()
    assert abs(chi_square - 195) < 4 * (2 * 195) ** 0.5
    for number, (low, high) in enumerate(MAGNITUDES.values()):
        magnitude = draw.magnitude[draw.operation == number].double()
        assert low <= magnitude.min()
        assert magnitude.max() <= high
        assert abs(magnitude.mean() - (low + high) / 2) <= 4 * (high - low) / (12 * len(magnitude)) ** 0.5


def test_ranges_equal_the_reference():
    assert len(OPERATIONS) == 14
    assert randaugment.ROUNDS == 2
    assert [name for name, (low, high) in MAGNITUDES.items() if low == high == 0] == list(OPERATIONS[:3])
    assert {MAGNITUDES[name] for name in OPERATIONS[5:9]} == {(0.05, 0.95)}
    assert {MAGNITUDES[name] for name in OPERATIONS[10:]} == {(-0.3, 0.3)}
    assert (MAGNITUDES["posterize"], MAGNITUDES["solarize"], MAGNITUDES["rotate"]) == ((4, 8), (0, 256), (-30, 30))


def test_a_batch_gets_both_operations_and_the_hole_of_each_sample():
    """Compares each sample with a chain of Pillow's operations, in any batch."""
    size, height, width = 300, 12, 10
    draw = draw_randaugment(size, height, width, torch.Generator().manual_seed(5))
    images = random_images(size, height, width)
    expected = []
    for pixels, operations, magnitudes, (top, bottom, left, right) in zip(images, *draw, strict=True):
        for operation, magnitude in zip(operations, magnitudes, strict=True):
            pixels = by_pillow(OPERATIONS[operation], pixels, magnitude.item())
        pixels = pixels.clone()
        pixels[top : bottom + 1, left : right + 1] = torch.tensor(randaugment.HOLE_COLOR, dtype=torch.uint8)
        expected.append(pixels)
    expected = torch.stack(expected)

    steps = [slice(0, 1), slice(1, 120), slice(120, 297), slice(297, 300)]
    augment = RandAugment(draw, steps, height, width)
    actual = [augment(images[step], number) for number, step in enumerate(steps)]
    assert torch.equal(torch.cat(actual), expected)
    assert torch.equal(augment(images[steps[2]], 2), actual[2])  # in any order


def test_no_operation_and_no_hole_is_the_image():
    images = random_images(3, 8, 8)
    nothing = torch.zeros(3, 2)
    draw = RandAugmentDraw(nothing.long(), nothing, torch.tensor([8, 8, 8, 8]).expand(3, 4))
    assert torch.equal(RandAugment(draw, [slice(0, 3)], 8, 8)(images, 0), images)


def test_one_image_draws_from_the_global_generator():
    image = random_images(1, 9, 7).squeeze(0)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        actual = randaugment_image(image.permute(2, 0, 1))
    draw = draw_randaugment(1, 9, 7, torch.Generator().manual_seed(4))
    assert torch.equal(actual.permute(1, 2, 0), RandAugment(draw, [slice(0, 1)], 9, 7)(image[None], 0)[0])
