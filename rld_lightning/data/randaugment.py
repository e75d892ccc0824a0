"""The strong view of two-view methods: RandAugment and Cutout on a whole batch of uint8 images at once.

This is what the public code of MLKD (Jin-Ying/Multi-Level-Logit-Distillation), and the code of RLD based on it, call
``RandAugment(2, 10)``, for CIFAR-100 and for ImageNet: FixMatch's variant. Two of 14 operations are drawn, with
replacement, each with a magnitude drawn uniformly from its whole range (the 10 is not used), followed by Cutout. This
differs from torchvision's ``RandAugment``, which has one magnitude for all and no Cutout.

That code calls Pillow for each image. Here Pillow's arithmetic is implemented for batches, in integers where Pillow
uses integers, so that the pixels are the same on every device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rld_lightning.data.augment import Device

# The range of each operation's magnitude. Operations that only move pixels are last: they are applied together.
MAGNITUDES = {
    "identity": (0.0, 0.0),
    "autocontrast": (0.0, 0.0),
    "equalize": (0.0, 0.0),
    "posterize": (4.0, 8.0),
    "solarize": (0.0, 256.0),
    "brightness": (0.05, 0.95),
    "color": (0.05, 0.95),
    "contrast": (0.05, 0.95),
    "sharpness": (0.05, 0.95),
    "rotate": (-30.0, 30.0),
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "translate_x": (-0.3, 0.3),
    "translate_y": (-0.3, 0.3),
}
OPERATIONS = tuple(MAGNITUDES)
FIRST_MOVE = OPERATIONS.index("rotate")
ROUNDS = 2
LARGEST_HOLE = 0.5
HOLE_COLOR = (125, 123, 114)


class RandAugmentDraw(NamedTuple):
    """The random draws for N samples, on the CPU."""

    operation: Tensor  # positions in `OPERATIONS`, int64 `(N, 2)`
    magnitude: Tensor  # in the range of each operation, float32 `(N, 2)`
    hole: Tensor  # first and last row, first and last column of Cutout's rectangle, int64 `(N, 4)`


def draw_randaugment(size: int, height: int, width: int, generator: torch.Generator) -> RandAugmentDraw:
    """Draws two operations, their magnitudes and a hole for ``size`` images from a CPU generator."""
    operation = torch.randint(len(OPERATIONS), (size, ROUNDS), generator=generator)
    low, high = torch.tensor(list(MAGNITUDES.values()), dtype=torch.float64)[operation].unbind(-1)
    uniform = torch.rand(size, ROUNDS + 3, generator=generator, dtype=torch.float64)
    magnitude = low + (high - low) * uniform[:, :ROUNDS]
    share, *centre = uniform[:, ROUNDS:].unbind(-1)
    side = LARGEST_HOLE * width * share
    hole = []
    for position, extent in zip(centre, (height, width), strict=True):
        first = (extent * position - side / 2).clamp(min=0).floor()
        hole += [first, (first + side).clamp(max=extent).floor()]
    return RandAugmentDraw(operation, magnitude.float(), torch.stack(hole, dim=-1).long())


class RandAugment:
    """Applies the drawn operations to batches.

    The constructor moves all draws to the device and counts on the CPU how many samples of each batch get which
    operation, so that a step only launches kernels, without synchronisation.

    Args:
        draw: the draws for all M samples, in the order of the batches.
        steps: the slice of the M samples in each batch; together they cover all, in order.
        height: H.
        width: W.
        device: device of the images.
    """

    def __init__(
        self, draw: RandAugmentDraw, steps: Sequence[slice], height: int, width: int, device: Device = "cpu"
    ) -> None:
        self.steps = steps
        self.hole = draw.hole.to(device)
        self.hole_row = torch.tensor(HOLE_COLOR, dtype=torch.uint8, device=device).repeat(width)
        step_sizes = torch.tensor([step.stop - step.start for step in steps])
        step_number = torch.arange(len(steps)).repeat_interleave(step_sizes)
        start = (step_sizes.cumsum(0) - step_sizes)[step_number]
        self.rounds = []
        for operation, magnitude in zip(draw.operation.T, draw.magnitude.T, strict=True):
            kinds = FIRST_MOVE + 1
            key = step_number * kinds + operation.clamp(max=FIRST_MOVE)
            order = key.argsort(stable=True)
            sizes = key.bincount(minlength=len(steps) * kinds).view(-1, kinds).tolist()
            moves = fixed_point_moves(operation[order], magnitude[order], height, width)
            on_device = (order - start, order.argsort() - start, magnitude[order], moves)
            self.rounds.append((*(values.to(device) for values in on_device), sizes))

    def __call__(self, images: Tensor, number: int) -> Tensor:
        """Augments the uint8 images ``(B, H, W, 3)`` of batch ``number``."""
        step = self.steps[number]
        for order, restore, magnitude, moves, sizes in self.rounds:
            parts = images.index_select(0, order[step]).split(sizes[number])
            magnitudes = magnitude[step, None, None, None].split(sizes[number])
            still, *adjusted, moved = parts
            adjusting = zip(ADJUSTMENTS, adjusted, magnitudes[1:-1], strict=True)
            done = [still] + [adjust(part, amount) for adjust, part, amount in adjusting if len(part)]
            if len(moved):
                done.append(move(moved, moves[step][-len(moved) :]))
            images = torch.cat(done).index_select(0, restore[step])
        return cutout(images, self.hole[step], self.hole_row)


def randaugment_image(image: Tensor) -> Tensor:
    """Augments one uint8 image ``(3, H, W)``, with draws from the global CPU generator."""
    height, width = image.shape[1:]
    draw = draw_randaugment(1, height, width, torch.default_generator)
    augment = RandAugment(draw, [slice(0, 1)], height, width, image.device)
    return augment(image.permute(1, 2, 0).unsqueeze(0), 0).squeeze(0).permute(2, 0, 1)


def autocontrast(images: Tensor, magnitude: Tensor) -> Tensor:
    """Stretches each channel to 0..255; a constant channel does not change.

    Like Pillow, computes a table in 64-bit floats, which sometimes falls just short of a whole number.
    """
    low, high = (x.double() for x in _on_float64(torch.stack(images.flatten(1, 2).aminmax(dim=1))).unsqueeze(-1))
    values = torch.arange(256, device=low.device, dtype=torch.float64)
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # 255 / x is 255 times a rounded reciprocal
    stretched = (values * scale + -low * scale).clamp(0, 255)
    table = torch.where(high > low, stretched, values).byte().to(images.device)
    channels = 256 * torch.arange(table.shape[0] * table.shape[1], device=images.device)
    bins = channels.view(len(images), 1, 1, -1) + images
    return table.view(-1).index_select(0, bins.view(-1)).view(images.shape)


def _on_float64(values: Tensor) -> Tensor:
    return values.cpu() if values.device.type == "mps" else values  # Apple's GPUs have no float64


def equalize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Equalises the histogram of each channel."""
    samples, height, width, channels = images.shape
    histograms = torch.arange(samples * channels, device=images.device).view(samples, 1, 1, channels)
    bins = (256 * histograms + images).view(-1)
    count = torch.zeros(samples * channels * 256, dtype=torch.int64, device=images.device)
    count = count.scatter_add_(0, bins, torch.ones_like(bins)).view(samples, channels, 256)
    largest = images.flatten(1, 2).amax(1).long().unsqueeze(-1)
    step = (height * width - count.gather(-1, largest)) // 255
    table = (count.cumsum(-1) - count + step // 2) // step.clamp(min=1)
    table = torch.where(step > 0, table.clamp(max=255), torch.arange(256, device=images.device))
    return table.byte().view(-1).index_select(0, bins).view(images.shape)


def posterize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Keeps the highest bits of each value; their number is the magnitude rounded down."""
    return images & (256 - torch.bitwise_left_shift(1, 8 - magnitude.int())).byte()


def solarize(images: Tensor, magnitude: Tensor) -> Tensor:
    """Inverts values at or above the magnitude."""
    return torch.where(images < magnitude, images, 255 - images)


def brightness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Reduces brightness: 0 is black, 1 the image."""
    return (magnitude * images).byte()


def color(images: Tensor, magnitude: Tensor) -> Tensor:
    """Reduces colour: 0 is grey, 1 the image."""
    return _blend(_grey(images), images, magnitude)


def contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    """Reduces contrast: 0 is the rounded mean of the grey image, 1 the image."""
    pixels = images.shape[1] * images.shape[2]
    mean = (2 * _grey(images).sum((1, 2), keepdim=True) + pixels) // (2 * pixels)
    return _blend(mean, images, magnitude)


def sharpness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Smooths: 0 is the mean of 3x3 pixels with a centre weight of five, 1 the image; the border does not change."""
    pixels = images.int()
    middle = pixels[:, 1:-1, 1:-1]
    total = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    total = total[:, :, :-2] + total[:, :, 1:-1] + total[:, :, 2:] + 4 * middle
    result = images.clone()
    result[:, 1:-1, 1:-1] = _blend((2 * total + 13) // 26, middle, magnitude)
    return result


ADJUSTMENTS = (autocontrast, equalize, posterize, solarize, brightness, color, contrast, sharpness)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.int().split(1, dim=-1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(base: Tensor, images: Tensor, magnitude: Tensor) -> Tensor:
    # The difference is an integer, and the product is rounded before the sum, so that all devices agree.
    return (base + magnitude * (images - base)).byte()


def fixed_point_moves(operation: Tensor, magnitude: Tensor, height: int, width: int) -> Tensor:
    """Converts rotation, shear or translation to the integers of Pillow's resampling.

    Args:
        operation: positions in ``OPERATIONS``, int64 ``(N,)``.
        magnitude: degrees anticlockwise, a slope, or a share of the width or height, ``(N,)``.
        height: H.
        width: W.

    Returns:
        ``(a, b, c, d, e, f)``, int32 ``(N, 6)``: pixel (x, y) is read from column ``(a x + b y + c) >> 16`` and row
        ``(d x + e y + f) >> 16``. For operations that move nothing, this is the identity.
    """
    magnitude = magnitude.double()
    angle, shear_x, shear_y, shift_x, shift_y = (
        torch.where(operation == OPERATIONS.index(name), magnitude, 0.0) for name in OPERATIONS[FIRST_MOVE:]
    )
    cos, sin = torch.deg2rad(angle).cos(), torch.deg2rad(angle).sin()
    a, b, d, e = cos, shear_x - sin, shear_y + sin, cos
    # Rotation is about the centre; shifts are whole pixels; pixels are read at their centre.
    c = (1 - cos) * width / 2 + sin * height / 2 + (shift_x * width + 0.5).floor() + (a + b) / 2
    f = (1 - cos) * height / 2 - sin * width / 2 + (shift_y * height + 0.5).floor() + (d + e) / 2
    return (torch.stack([a, b, c, d, e, f], dim=-1) * 65536 + 0.5).floor().int()


def move(images: Tensor, moves: Tensor) -> Tensor:
    """Resamples to the nearest pixel, with black outside.

    Args:
        images: uint8 ``(B, H, W, 3)``.
        moves: result of :func:`fixed_point_moves`, int32 ``(B, 6)``.
    """
    samples, height, width, channels = images.shape
    y = torch.arange(height, dtype=torch.int32, device=images.device).unsqueeze(-1)
    x = torch.arange(width, dtype=torch.int32, device=images.device)
    a, b, c, d, e, f = moves[:, :, None, None].unbind(1)
    column, row = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    image = torch.arange(samples, device=images.device)[:, None, None]
    source = torch.where(inside, (image * height + row) * width + column, 0)
    moved = images.view(-1, channels).index_select(0, source.view(-1)).view(images.shape)
    return moved * inside.unsqueeze(-1)


def cutout(images: Tensor, hole: Tensor, filling: Tensor) -> Tensor:
    """Fills a rectangle of each image.

    Args:
        images: uint8 ``(B, H, W, 3)``.
        hole: first and last row, first and last column, int64 ``(B, 4)``.
        filling: a row of pixels in the fill colour, uint8 ``(3 W,)``.
    """
    top, bottom, left, right = hole.T[..., None, None]
    height, channels = images.shape[1], images.shape[3]
    rows = torch.arange(height, device=images.device).unsqueeze(-1)
    columns = torch.arange(len(filling), device=images.device) // channels
    inside = ((rows >= top) & (rows <= bottom)) & ((columns >= left) & (columns <= right))
    # On rows of channel values: broadcasting a condition per pixel over three channels is slow on a CPU.
    return torch.where(inside, filling, images.flatten(2)).view(images.shape)
