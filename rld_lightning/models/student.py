"""A trained network ready for use, with its weights, classes and preprocessing, loaded from any of our files."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rld_lightning.errors import first_line
from rld_lightning.models.imported import trust
from rld_lightning.models.preprocessing import Preprocessing, preprocessing_of
from rld_lightning.models.weights.companion_files import find_weights
from rld_lightning.models.weights.facts import WeightsFacts, facts_of
from rld_lightning.models.weights.read import Weights, WeightsError
from rld_lightning.models.weights.verify import create_fitting
from rld_lightning.mps import image_layout

if TYPE_CHECKING:
    from rld_lightning.models.preprocessing import Picture

EXPORT = "export"  # folder of an export in a run directory
_LARGEST_TRIED = 1024  # pixels of a side: larger images would need gigabytes before there is a picture


class Prediction(NamedTuple):
    """A predicted class and its probability, in [0, 1]."""

    name: str
    probability: float


class Student(nn.Module):
    """A trained network in evaluation mode, with its classes and preprocessing.

    Args:
        network: maps normalised images ``(B, 3, H, W)`` to logits ``(B, C)``.
        classes: the C names, in the order of the logits.
        transform: converts a picture to the network's input, ``(3, H, W)``.
        name: the network's name for :func:`~rld_lightning.models.create_model`.
        facts: the metadata of its weights file.
    """

    def __init__(
        self, network: nn.Module, classes: Sequence[str], transform: Preprocessing, name: str, facts: WeightsFacts
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = list(classes)
        self.transform = transform
        self.name = name
        self.facts = facts
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits ``(B, C)`` of normalised images ``(B, 3, H, W)``."""
        return self.network(images)

    @torch.inference_mode()
    def predict(self, *pictures: "Picture", top: int = 5) -> list[list[Prediction]]:
        """Returns the most likely classes of each picture, best first.

        Args:
            pictures: paths, PIL images, arrays or tensors, see :class:`Preprocessing`.
            top: number of classes to return.
        """
        if not pictures:
            return []
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        images = torch.stack([self.transform(picture) for picture in pictures]).to(device)
        best = self(images.contiguous(memory_format=image_layout(device))).float().softmax(1)
        most_likely = best.topk(min(top, len(self.classes)), 1)
        return [
            [Prediction(self.classes[index], value) for value, index in zip(values, indices, strict=True)]
            for values, indices in zip(most_likely.values.tolist(), most_likely.indices.tolist(), strict=True)
        ]


def check_numbers(logits: Tensor, of: str) -> None:
    """Refuses logits ``(..., C)`` without a prediction.

    Args:
        of: whose they are, for the message.

    Raises:
        ValueError: some are NaN or infinite, so that their probabilities are not numbers.
    """
    if logits.float().softmax(-1).isnan().any():
        raise ValueError(f"{of} has logits that are not numbers: check how its weights were trained or converted.")


def load_student(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    class_names: Sequence[str] | None = None,
    **preprocessing: Any,
) -> Student:
    """Loads a trained network from a run directory, an export or any weights file, without executing anything in it.

    Args:
        path: a run directory, a folder in the layout of the Hugging Face Hub (``config.json`` and
            ``model.safetensors``), a ``.safetensors`` file or a checkpoint.
        name: the network; overrides the file's.
        class_names: the classes in the order of the logits; overrides the file's. Numbers if neither has them.
        preprocessing: ``image_size``, ``resize``, ``mean``, ``std`` and ``interpolation``; override the file's.

    Returns:
        the network in evaluation mode on the CPU, with ``classes`` and ``transform``.

    Raises:
        FileNotFoundError: there is no such file or folder.
        WeightsError: the file cannot be used, lacks metadata, or states a size of images that the network cannot take.
        ValueError: the file names an external network that you have neither named nor trusted.
    """
    weights = find_weights(path)
    facts = facts_of(weights)
    if (name or facts.name) is None:
        raise WeightsError(f"{weights.source} does not say which model it is of; give name=<model>")
    trust(name)  # not the name in the file
    name = str(name or facts.name)
    classes = list(class_names or facts.class_names or ())
    number = len(classes) or facts.num_classes or _width(weights)
    if class_names and facts.num_classes not in (None, number):
        raise WeightsError(
            f"{weights.source} has {facts.num_classes} classes, and there are {number} class names; give "
            "class_names for all, in the order of its logits"
        )
    network, _ = create_fitting(name, number, weights)
    transform = preprocessing_of(facts, name, weights.source, **preprocessing)
    _check_size(network, transform.size, f"{weights.source}: {name}")
    return Student(network, classes or [str(index) for index in range(number)], transform, name, facts)


def _check_size(network: nn.Module, size: tuple[int, int], what: str) -> None:
    """Refuses a size of images that a network does not take, which its file may state."""
    if max(size) > _LARGEST_TRIED:
        return
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, 3, *size))
    except Exception as error:  # each library has its own exceptions
        shown = "x".join(map(str, size))
        raise WeightsError(f"{what} cannot take images of {shown} ({first_line(error)}); give image_size") from error


def _width(weights: Weights) -> int:
    """Returns the number of outputs of the last layer, by the shape of its bias or weight."""
    last = [
        value for key, value in weights.state_dict.items() if value.ndim in (1, 2) and key.endswith(("bias", "weight"))
    ]
    if not last or last[-1].shape[0] < 2:
        raise WeightsError(f"{weights.source} does not state the number of classes; give class_names")
    return last[-1].shape[0]
