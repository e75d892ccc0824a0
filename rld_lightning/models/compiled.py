"""Functions of a training step, compiled for one batch size."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import torch._functorch.config as partitioning
from torch import Tensor

from rld_lightning.console import print_line
from rld_lightning.errors import first_line


class CompiledCall:
    """Calls the compiled function for batches of one size, and the uncompiled function for all others.

    So the last, smaller batch of an epoch triggers no recompilation and no dynamic shapes, and a network's validation,
    export, weight averages and checkpoints still use the plain network. It is compiled at the first call. If that
    fails, a line is printed and the uncompiled function is used from then on.

    Args:
        function: a network, or any function whose first argument is a tensor with B rows.
        size: B of the batches to compile for.
        name: the function's name in a printed line.
        device: see :func:`compile_for`.
        of_logits: likewise.
    """

    def __init__(
        self, function: Callable[..., Any], size: int, name: str, device: torch.device, *, of_logits: bool = False
    ) -> None:
        self.function, self.size, self.name, self.device, self.of_logits = function, size, name, device, of_logits
        self.compiled: Any = compile_for(device, function, of_logits=of_logits)

    def __call__(self, rows: Tensor, *others: Tensor | None) -> Any:
        """Returns the function's result."""
        if self.compiled is None or len(rows) != self.size:
            return self.function(rows, *others)
        try:
            return self.compiled(rows, *others)
        except Exception as error:
            from torch._dynamo.exc import TorchDynamoException  # a slow import, done already by compiling

            if not isinstance(error, TorchDynamoException):
                raise
            self.compiled = None  # compiling failed, so nothing has run yet
            print_line("compile", f"off: {self.name} cannot be compiled: {first_line(error)}")
            return self.function(rows, *others)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Wraps the copy of the function, not this one."""
        function = copy.deepcopy(self.function, memo)
        return type(self)(function, self.size, self.name, self.device, of_logits=self.of_logits)


def compile_for(device: torch.device, function: Callable[..., Any], *, of_logits: bool = False) -> Callable[..., Any]:
    """Returns the function, compiled for one shape of its arguments at its first call.

    Args:
        device: the arguments' device. On a GPU, kernels that do not depend on each other are merged: a third of those
            that are compiled for a training step, most of them conversions of weights and gradients.
        function: a network or a function.
        of_logits: whether it is a loss. On a GPU, its backward pass then computes the softmaxes again, in the one
            kernel that it has anyway, instead of storing several tensors of all logits.
    """
    if device.type != "cuda":
        return torch.compile(function, dynamic=False)
    compiled = torch.compile(function, dynamic=False, options={"combo_kernels": True})
    return partitioning.patch(aggressive_recomputation=True)(compiled) if of_logits else compiled


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
    return folder if Path(folder).stat().st_uid != os.getuid() else ""
