"""Teachers that are programs of their own: TorchScript and ONNX files, which say logits and nothing else."""

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
    "a TorchScript or ONNX file says logits and nothing else, and the loss looks inside its networks; choose a loss of "
    "logits, or a teacher with its weights in a file."
)


class ScriptedNetwork(nn.Module):
    """A TorchScript file. Loading one runs the program that is in it.

    Raises:
        ValueError: it is no such file.
    """

    no_stages = _NO_STAGES
    size: tuple[int, int] | None = None  # it does not say
    facts = WeightsFacts()

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self.program = torch.jit.load(str(path), map_location="cpu")
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is not a TorchScript file ({first_line(error)}).") from error

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C)``."""
        return logits_of(self.program(images))


class OnnxTeacher(nn.Module):
    """An ONNX file as a network, run by ONNX Runtime, on a GPU where it has that.

    Args:
        path: the file, which takes normalised images ``(B, 3, H, W)`` and gives logits ``(B, C)``. B may be fixed;
            batches are then cut, and filled up.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ValueError: it is no such file.
    """

    no_stages = _NO_STAGES

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.file = OnnxNetwork(path, device="cuda" if torch.cuda.is_available() else "cpu")
        if self.file.takes_pixels:
            raise ValueError(
                f"{path} takes pixels and gives probabilities, where logits of normalised images are wanted; take the "
                "file of an export with pixels=false."
            )
        batch, _, height, width = self.file.input.shape
        self.facts = self.file.facts
        self.batch = batch if isinstance(batch, int) else None
        self.takes_half = "float16" in self.file.input.type
        self.size = (height, width) if isinstance(height, int) and isinstance(width, int) else None

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C)`` on the same device."""
        given = images.half() if self.takes_half else images.float()
        said = []
        for part in given.split(self.batch or len(given)):
            missing = (self.batch or len(part)) - len(part)
            said.append(self.file(torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]))[: len(part)])
        return torch.cat(said).float().to(images.device)


class Columns(nn.Module):
    """Some of the logits of a network, in an order of their own.

    Args:
        places: for each logit to come, its place among those that there are.
    """

    no_stages = _NO_STAGES

    def __init__(self, network: nn.Module, places: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.places = list(places)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C)``."""
        return self.network(images)[:, self.places]


def load_foreign(name: str, path: Path) -> ScriptedNetwork | OnnxTeacher:
    """Loads a file of one of the two kinds."""
    return ScriptedNetwork(path) if name == "torchscript" else OnnxTeacher(path)
