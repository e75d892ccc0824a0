import pytest
import torch
from torchvision import transforms
from torchvision.transforms import v2

from rld_lightning.data.augment import CropFlip, Normalize, crop_flip, draw_crop_flip, pad_images

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def random_images(size, height, width, seed=0):
    return torch.randint(
        256, (size, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def draw(size, padding=4, flip=True, seed=0):
    return draw_crop_flip(size, padding=padding, flip=flip, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), (8, 8, 1), (6, 9, 2), (5, 5, 0)])
def test_crop_flip_equals_pad_crop_and_flip_of_each_sample(height, width, padding):
    images = random_images(40, height, width)
    index = torch.randint(40, (100,), generator=torch.Generator().manual_seed(1))
    drawn = draw(100, padding)

    crops = crop_flip(pad_images(images, padding), index, drawn, height, width)

    for crop, i, top, left, flip in zip(crops, index, *drawn, strict=True):
        expected = v2.functional.pad(images[i].permute(2, 0, 1), [padding])
        expected = v2.functional.crop(expected, top, left, height, width)
        expected = v2.functional.horizontal_flip(expected) if flip else expected
        assert torch.equal(crop, expected.permute(1, 2, 0))


def test_crop_in_the_middle_is_the_image():
    images = random_images(5, 8, 8)
    middle = CropFlip(torch.full((5,), 2), torch.full((5,), 2), torch.zeros(5, dtype=torch.bool))
    assert torch.equal(crop_flip(pad_images(images, 2), torch.arange(5), middle, 8, 8), images)


def test_offsets_are_uniform_and_independent():
    size, offsets = 81_000, 9
    top, left, flip = draw(size)
    cells = torch.bincount((top * offsets + left) * 2 + flip, minlength=offsets**2 * 2)
    expected = size / len(cells)
    chi_square = ((cells - expected) ** 2 / expected).sum().item()
    degrees = len(cells) - 1
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5
    assert (top.min(), top.max(), left.min(), left.max()) == (0, 8, 0, 8)


def test_flip_rate_is_one_half():
    rate = draw(40_000).flip.float().mean().item()
    assert abs(rate - 0.5) < 4 * 0.5 / 200
    assert not draw(1000, flip=False).flip.any()


def test_disabling_flips_does_not_change_the_crops():
    with_flips, without = draw(100), draw(100, flip=False)
    assert torch.equal(with_flips.top, without.top)
    assert torch.equal(with_flips.left, without.left)


def test_each_sample_has_its_own_draw():
    drawn = torch.stack([values.long() for values in draw(64)], dim=1)
    assert len(drawn.unique(dim=0)) > 32


def test_normalize_is_bit_identical_to_torchvision():
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3).contiguous()
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    normalized = Normalize(MEAN, STD, 16, 16)(values)

    assert normalized.dtype == torch.float32
    assert normalized.shape == (1, 3, 16, 16)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(normalized, reference(values[0].numpy())[None])
    pixel = (values.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.equal(normalized, pixel.permute(0, 3, 1, 2))
