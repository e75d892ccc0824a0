"""What Apple's GPUs lack in PyTorch (device ``mps``): float64, and in older versions some operators."""

import torch
from torch import Tensor


def widest_float(device: torch.device) -> torch.dtype:
    """Returns float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def lacks(operator: str, device: torch.device) -> bool:
    """Whether a device cannot run an operator of PyTorch, such as ``"_cdist_backward"``.

    With ``PYTORCH_ENABLE_MPS_FALLBACK=1`` PyTorch would run it on the CPU; without, it raises an error.
    """
    return device.type == "mps" and not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "MPS")


def where_it_runs(operator: str, values: Tensor) -> Tensor:
    """Returns the values, on the CPU if their device cannot run the operator."""
    return values.cpu() if lacks(operator, values.device) else values
