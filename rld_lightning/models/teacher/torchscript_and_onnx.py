"""Teachers from TorchScript and ONNX files, which return logits only."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rld_lightning.errors import first_line
from rld_lightning.models.imported import logits_of
from rld_lightning.models.onnx_file import OnnxNetwork
from rld_lightning.models.weights.facts import WeightsFacts

FOREIGN = ("torchscript", "onnx")  # names of networks
_NO_STAGES = (
    "a TorchScript or ONNX file returns logits only, and the loss needs the teacher's features; choose a loss of "
    "logits, or a teacher with its weights in a file."
)


class ScriptedNetwork(nn.Module):
    """A TorchScript file. Loading it executes the program in it.

    Raises:
        ValueError: it is not a TorchScript file.
    """

    no_stages = _NO_STAGES
    size: tuple[int, int] | None = None  # not stated in the file
    facts = WeightsFacts()

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self.program = torch.jit.load(str(path), map_location="cpu")
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is not a TorchScript file ({first_line(error)}).") from error

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``(B, 3, H, W)`` to ``(B, C)``."""
        return logits_of(self.program(images))


class OnnxTeacher(nn.Module):
    """An ONNX file as a network, run by ONNX Runtime, on a GPU if that is supported.

    Args:
        path: the file, which maps normalised images ``(B, 3, H, W)`` to logits ``(B, C)``. If B is fixed, batches are
            split and padded.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ValueError: it is not such a file.
    """

    no_stages = _NO_STAGES

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = OnnxNetwork(path, device="cuda" if torch.cuda.is_available() else "cpu")
        if self.file.takes_pixels:
            raise ValueError(
                f"{path} maps pixels to probabilities, but a teacher must map normalised images to logits; use the "
                "file of an export with pixels=false."
            )
        batch, _, height, width = self.file.input.shape
        self.facts = self.file.facts
        self.batch = batch if isinstance(batch, int) else None
        self.takes_half = "float16" in self.file.input.type
        self.size = (height, width) if isinstance(height, int) and isinstance(width, int) else None

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``(B, 3, H, W)`` to ``(B, C)`` on the same device."""
        images_cast = images.half() if self.takes_half else images.float()
        logits = []
        for part in images_cast.split(self.batch or len(images_cast)):
            missing = (self.batch or len(part)) - len(part)
            logits.append(self.file(torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]))[: len(part)])
        return torch.cat(logits).float().to(images.device)


class Columns(nn.Module):
    """A network with its logits selected and reordered.

    Args:
        places: the current position of each new logit.
    """

    no_stages = _NO_STAGES

    def __init__(self, network: nn.Module, places: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.places = list(places)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``(B, 3, H, W)`` to ``(B, C)``."""
        return self.network(images)[:, self.places]


def load_foreign(name: str, path: Path) -> ScriptedNetwork | OnnxTeacher:
    """Loads a TorchScript or ONNX file."""
    return ScriptedNetwork(path) if name == "torchscript" else OnnxTeacher(path)
