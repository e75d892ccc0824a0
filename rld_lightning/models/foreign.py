"""Teachers that are programs of their own: TorchScript and ONNX files, which say logits and nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rld_lightning.errors import first_line
from rld_lightning.models.imported import logits_of

FOREIGN = ("torchscript", "onnx")  # names of networks


class ScriptedNetwork(nn.Module):
    """A TorchScript file. Loading one runs the program that is in it.

    Args:
        path: what ``torch.jit.save`` has written.

    Raises:
        ValueError: it is no such file.
    """

    size: tuple[int, int] | None = None  # it does not say

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self.program = torch.jit.load(str(path), map_location="cpu")
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is no TorchScript file ({first_line(error)}).") from error

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C)``."""
        return logits_of(self.program(images))


class OnnxNetwork(nn.Module):
    """An ONNX file, run by ONNX Runtime in float32, on its GPU provider where that is installed.

    Args:
        path: the file, with one input, images ``(B, 3, H, W)``, and logits ``(B, C)`` as its first output. B may be
            fixed; batches are then cut, and filled up.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ValueError: it is no such file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError('an ONNX teacher needs onnxruntime: pip install "rld-lightning[onnx]"') from error
        there = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there]
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=providers)
        except Exception as error:  # of a kind of its own for each reason
            raise ValueError(f"{path} is no ONNX file that can be run ({first_line(error)}).") from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            raise ValueError(f"{path} takes {[entry.shape for entry in inputs]}, not images alone (B, 3, H, W).")
        self._input, shape = inputs[0].name, inputs[0].shape
        self._type = np.float16 if "float16" in inputs[0].type else np.float32
        self._batch = shape[0] if isinstance(shape[0], int) else None
        fixed = [side for side in shape[2:] if isinstance(side, int)]
        self.size = (fixed[0], fixed[1]) if len(fixed) == 2 else None

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C)`` on the same device."""
        given = images.float().cpu().numpy().astype(self._type)
        step = self._batch or len(given)
        said = []
        for first in range(0, len(given), step):
            part = given[first : first + step]
            filled = np.concatenate([part, np.repeat(part[-1:], step - len(part), 0)]) if len(part) < step else part
            said.append(self._run(np.ascontiguousarray(filled))[: len(part)])
        return torch.from_numpy(np.concatenate(said)).to(images.device)

    def _run(self, images: Any) -> Any:
        return self._session.run(None, {self._input: images})[0].astype(np.float32)


class Columns(nn.Module):
    """Some of the logits of a network, in an order of their own.

    Args:
        network: whose.
        places: for each logit to come, its place among those that there are.
    """

    def __init__(self, network: nn.Module, places: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.places = list(places)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C)``."""
        return self.network(images)[:, self.places]


def load_foreign(name: str, path: Path) -> ScriptedNetwork | OnnxNetwork:
    """Loads a file of one of the two kinds.

    Args:
        name: ``"torchscript"`` or ``"onnx"``.
        path: the file.
    """
    return ScriptedNetwork(path) if name == "torchscript" else OnnxNetwork(path)
