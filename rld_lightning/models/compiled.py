"""The student's forward pass in training, compiled for one batch size."""

import copy
import os
import sys
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from rld_lightning.console import print_line
from rld_lightning.errors import first_line


class CompiledForward:
    """Calls the compiled network for batches of one size, and the uncompiled network for all others.

    So the last, smaller batch of an epoch triggers no recompilation and no dynamic shapes, and validation, export,
    weight averages and checkpoints still use the plain network. It is compiled at the first call. If that fails, a
    line is printed and the uncompiled network is used from then on.

    Args:
        network: maps ``(B, C, H, W)`` images to logits.
        size: B of the batches to compile for.
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        self.network, self.size = network, size
        self.compiled: Any = torch.compile(network, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Returns the logits ``(B, K)``."""
        if self.compiled is None or len(images) != self.size:
            return self.network(images)
        try:
            return self.compiled(images)
        except Exception as error:
            from torch._dynamo.exc import TorchDynamoException  # a slow import, done already by compiling

            if not isinstance(error, TorchDynamoException):
                raise
            self.compiled = None  # compiling failed, so nothing has run yet
            print_line("compile", f"off: {type(self.network).__name__} cannot be compiled: {first_line(error)}")
            return self.network(images)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Wraps the copy of the network, not this one."""
        return type(self)(copy.deepcopy(self.network, memo), self.size)


def compile_error(device: torch.device) -> str:
    """Compiles a sum as a test; returns why that fails, such as a missing C++ compiler, or an empty string."""
    try:
        if stranger := _cache_of_another():
            return (
                f"PyTorch's cache of compiled programs, {stranger}, belongs to another user, who may put programs "
                "there; set TORCHINDUCTOR_CACHE_DIR to a folder of your own"
            )
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # from the compiler, the linker, an unwritable cache ...
        return first_line(error)
    return ""


def _cache_of_another() -> str:
    """Returns PyTorch's cache of compiled programs if another user created it (its path is easily guessed), else ''."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = cache_dir()
    return folder if sys.platform != "win32" and Path(folder).stat().st_uid != os.getuid() else ""
