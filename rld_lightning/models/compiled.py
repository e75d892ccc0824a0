"""The forward pass of a network in training, compiled for batches of one size."""

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
    """Calls a network, compiled where a batch has the size that it is compiled for, and as it is where it has not.

    So the last, smaller batch of an epoch compiles nothing anew and does not make the code general, and the network
    itself stays what it is for all others: validation, export, average, checkpoints. It is compiled at the first call.
    If that fails, a line says so and the network is called as it is from then on.

    Args:
        network: maps ``(B, C, H, W)`` images to logits.
        size: B of the batches to compile for.
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        self.network, self.size = network, size
        self.compiled: Any = torch.compile(network, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``(B, K)``."""
        if self.compiled is None or len(images) != self.size:
            return self.network(images)
        try:
            return self.compiled(images)
        except Exception as error:
            from torch._dynamo.exc import TorchDynamoException  # a second, which compiling has taken already

            if not isinstance(error, TorchDynamoException):
                raise
            self.compiled = None  # nothing has run yet
            print_line("compile", f"off: {type(self.network).__name__} cannot be compiled: {first_line(error)}")
            return self.network(images)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Of the copied network, not of this one."""
        return type(self)(copy.deepcopy(self.network, memo), self.size)


def why_not_compiled(device: torch.device) -> str:
    """Tries to compile a sum; why that fails here, such as for want of a C++ compiler, or nothing where it works."""
    try:
        if stranger := _cache_of_another():
            return (
                f"PyTorch's cache of compiled programs, {stranger}, belongs to another user, who may put programs "
                "there; set TORCHINDUCTOR_CACHE_DIR to a folder of your own"
            )
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of the compiler, the linker, a cache that cannot be written ...
        return first_line(error)
    return ""


def _cache_of_another() -> str:
    """The folder that PyTorch runs compiled programs from, if another user has made it; its name is easily guessed."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = cache_dir()
    return folder if sys.platform != "win32" and Path(folder).stat().st_uid != os.getuid() else ""
