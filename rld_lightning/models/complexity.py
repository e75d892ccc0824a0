"""How large a network is and how much it computes."""

import math
import time

import torch
from torch import nn

from rld_lightning.models.taps import evaluation_mode, unwrap


def count_parameters(model: nn.Module) -> int:
    """Number of weights, trainable or not; buffers such as running statistics do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def is_mostly_depthwise(model: nn.Module) -> bool:
    """Whether most convolutions that look at more than a pixel see each channel alone, as MobileNet's do."""
    wide = [part for part in model.modules() if isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1]
    return 2 * sum(part.groups == part.in_channels > 1 for part in wide) > len(wide)


def count_macs(model: nn.Module, image_shape: tuple[int, int, int] = (3, 32, 32)) -> int:
    """Multiply-accumulate operations for one image, in evaluation mode.

    Convolutions, matrix products and attention count, as in published tables; normalisation, activations and pooling do
    not. One forward of zeros runs on the model's own device and type; training modes, statistics, gradients and the
    random state are left as they were.

    Args:
        model: any network that takes one batch of images.
        image_shape: channels, height and width.

    Returns:
        half the floating-point operations that PyTorch counts, as one multiply-accumulate is two of them.
    """
    from torch.utils.flop_counter import FlopCounterMode  # a second, for Triton

    model = unwrap(model)
    like = next(model.parameters(), torch.empty(0))
    images = torch.zeros(1, *image_shape, device=like.device, dtype=like.dtype)
    counter = FlopCounterMode(display=False)
    with evaluation_mode(model), torch.no_grad(), counter:
        model(images)
    return counter.get_total_flops() // 2


def images_per_second(
    model: nn.Module, image_shape: tuple[int, int, int] = (3, 32, 32), *, batch_size: int = 64, seconds: float = 1.0
) -> float:
    """Forward passes in evaluation mode, measured on the model's device: the fastest batch within ``seconds``.

    The fastest, since other programs only ever slow a batch down: two measurements of one network agree.

    Args:
        model: any network that takes one batch of images; it is put in evaluation mode.
    """
    model.eval()
    like = next(model.parameters(), torch.empty(0))
    images = torch.randn(batch_size, *image_shape, device=like.device, dtype=like.dtype)
    fastest = math.inf
    with torch.no_grad():
        for _ in range(2):
            model(images)
        stop = time.perf_counter() + seconds
        while (start := time.perf_counter()) < stop or fastest == math.inf:
            model(images)
            if like.is_cuda:
                torch.cuda.synchronize(like.device)
            fastest = min(fastest, time.perf_counter() - start)
    return batch_size / fastest
