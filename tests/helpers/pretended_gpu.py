"""A GPU that is only pretended: its tensors are fake, with a device and a shape but no data."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Context in which ``device="cuda"`` needs no GPU; reading a value and mixing devices raise.

    So operations that would wait for the GPU fail, such as ``.item()``, ``nonzero`` and indexing by a mask. Only for
    forward passes; autocast has no effect.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def move_to_pretended_gpu(module: nn.Module) -> None:
    """Replaces all parameters and buffers by fake ones, in the context of :func:`pretended_gpu`."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, value in tensors.items():
                if value is None:
                    continue
                moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
                is_parameter = tensors is part._parameters
                tensors[name] = nn.Parameter(moved, value.requires_grad) if is_parameter else moved
