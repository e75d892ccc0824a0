"""A network's size, operation count and speed."""

import math
import time

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rld_lightning.models.taps import evaluation_mode, unwrap


def count_parameters(model: nn.Module) -> int:
    """Counts the parameters, trainable or not; buffers such as running statistics do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def is_mostly_depthwise(model: nn.Module) -> bool:
    """Whether most convolutions with kernels above 1x1 are depthwise, as in MobileNet."""
    wide = [part for part in model.modules() if isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1]
    return 2 * sum(part.groups == part.in_channels > 1 for part in wide) > len(wide)


def count_macs(model: nn.Module, image_shape: tuple[int, int, int] = (3, 32, 32)) -> int:
    """Counts the multiply-accumulate operations for one image, in evaluation mode.

    Convolutions, matrix products and attention count, as in published tables; normalisation, activations and pooling do
    not. Runs one forward pass of zeros on the model's device and dtype, without changing training modes, statistics,
    gradients or the random state. Attention runs as matrix products: PyTorch does not count the fast path of
    :class:`torch.nn.MultiheadAttention` nor, in torch 2.11, its fused attention on a CPU.

    Args:
        model: any network that takes one batch of images.
        image_shape: channels, height and width.

    Returns:
        half the floating-point operations that PyTorch counts, since it counts two per multiply-accumulate.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, as it imports Triton, a second

    model = unwrap(model)
    like = next(model.parameters(), torch.empty(0))
    images = torch.zeros(1, *image_shape, device=like.device, dtype=like.dtype)
    counter = FlopCounterMode(display=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluation_mode(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def images_per_second(
    model: nn.Module, image_shape: tuple[int, int, int] = (3, 32, 32), *, batch_size: int = 64, seconds: float = 1.0
) -> float:
    """Measures the inference throughput on the model's device, by the fastest batch within ``seconds``.

    The fastest is the most repeatable, since other programs can only slow a batch down.

    Args:
        model: any network that takes one batch of images; it is put in evaluation mode.
        image_shape: channels, height and width.
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
            fastest = min(fastest, clock(like.device) - start)
    return batch_size / fastest


def clock(device: torch.device) -> float:
    """Waits until a device has finished its work, and reads the clock: seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
