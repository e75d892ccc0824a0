"""What Apple's GPUs lack in PyTorch (``mps``): float64; in older versions channels-last layout and some operators."""

import torch
from torch import Tensor


def widest_float(device: torch.device) -> torch.dtype:
    """Returns float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def image_layout(device: torch.device) -> torch.memory_format:
    """Returns the layout of images and networks on a device: channels-last, or contiguous on an Apple GPU.

    There, the gradient of a channels-last batch norm is wrong or an error, in PyTorch 2.11 among others
    (https://github.com/pytorch/pytorch/issues/175189, which pull request 188371 mended in June 2026).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def lacks(operator: str, device: torch.device) -> bool:
    """Whether a device cannot run an operator of PyTorch, such as ``"_cdist_backward"``.

    With ``PYTORCH_ENABLE_MPS_FALLBACK=1`` PyTorch would run it on the CPU; without, it raises an error.
    """
    return device.type == "mps" and not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "MPS")


def where_it_runs(operator: str, values: Tensor) -> Tensor:
    """Returns the values, on the CPU if their device cannot run the operator."""
    return values.cpu() if lacks(operator, values.device) else values
