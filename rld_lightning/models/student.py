"""A trained network ready to use: its weights, its classes, and what it wants to see, from whatever holds them."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rld_lightning.models.factory import create_model
from rld_lightning.models.preprocessing import Preprocessing, preprocessing_of
from rld_lightning.models.weights.facts import WeightsFacts, facts_of
from rld_lightning.models.weights.read import Weights, WeightsError, read_weights, split_part
from rld_lightning.models.weights.verify import check_fits, load_weights

if TYPE_CHECKING:
    from rld_lightning.models.preprocessing import Picture

RUN_WEIGHTS = "student.safetensors"  # in the folder of a run
HUB_WEIGHTS, HUB_CONFIG = "model.safetensors", "config.json"  # in a folder as the Hugging Face Hub has them
EXPORT = "export"  # such a folder within that of a run
_MOST_CONFIG = 10_000_000  # bytes; class names of the largest data sets are some hundred thousand


class Prediction(NamedTuple):
    """What a network takes a picture for, and how sure it is, in [0, 1]."""

    name: str
    probability: float


class Student(nn.Module):
    """A trained network in evaluation mode, with what one has to know to use it.

    Args:
        network: maps normalised images ``(B, 3, H, W)`` to logits ``(B, C)``.
        classes: the C names, in the order of the logits.
        transform: from a picture to what the network takes, ``(3, H, W)``.
        name: of the network, for :func:`~rld_lightning.models.create_model`.
        facts: what its file says.
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
        """Logits ``(B, C)`` of normalised images ``(B, 3, H, W)``."""
        return self.network(images)

    @torch.inference_mode()
    def predict(self, *pictures: "Picture", top: int = 5) -> list[list[Prediction]]:
        """What each picture shows, the likeliest first.

        Args:
            pictures: paths, PIL images, arrays or tensors, see :class:`Preprocessing`.
            top: how many classes to name.
        """
        if not pictures:
            return []
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        images = torch.stack([self.transform(picture) for picture in pictures]).to(device)
        best = self(images.contiguous(memory_format=torch.channels_last)).float().softmax(1)
        found = best.topk(min(top, len(self.classes)), 1)
        return [
            [Prediction(self.classes[index], value) for value, index in zip(values, indices, strict=True)]
            for values, indices in zip(found.values.tolist(), found.indices.tolist(), strict=True)
        ]


def load_student(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    class_names: Sequence[str] | None = None,
    **look: Any,
) -> Student:
    """A trained network from the folder of a run, an export, or any file of weights; nothing in it is executed.

    Args:
        path: the folder of a run, a folder as the Hugging Face Hub has them (``config.json`` and
            ``model.safetensors``), a ``.safetensors`` file or a checkpoint.
        name: the network, where the file does not say it, or is not to be believed.
        class_names: the classes in the order of the logits, likewise; numbers where nobody says.
        look: ``image_size``, ``resize``, ``mean``, ``std`` and ``interpolation``, likewise.

    Returns:
        the network in evaluation mode on the CPU, with ``classes`` and ``transform``.

    Raises:
        FileNotFoundError: there is no such file or folder.
        WeightsError: it cannot be used, or says too little about itself.
    """
    weights = find_weights(path)
    facts = facts_of(weights)
    if (name or facts.name) is None:
        raise WeightsError(f"{weights.source} does not say which model it is of; give name=<model>")
    if name is None and ":" in str(facts.name):
        raise WeightsError(
            f"{weights.source} says that it is of {facts.name!r}, which is code to import; give name={facts.name} "
            "yourself if you trust it"
        )
    name = str(name or facts.name)
    classes = list(class_names or facts.class_names or ())
    number = len(classes) or facts.num_classes or _width(weights)
    check_fits(name, number, weights)
    network = create_model(name, number)
    load_weights(network, weights, name=name)
    transform = preprocessing_of(facts, name, weights.source, **look)
    return Student(network, classes or [str(index) for index in range(number)], transform, name, facts)


def find_weights(path: str | os.PathLike[str]) -> Weights:
    """Reads weights from a file or a folder, with what lies beside them and says more about them.

    Args:
        path: as in :func:`load_student`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        WeightsError: it cannot be used.
    """
    file, part = split_part(path)
    if not file.is_dir():
        if file.suffix == ".onnx":
            raise WeightsError(f"{file} is a program with weights in it, not weights; give the export's folder instead")
        if file.suffix == ".pt2":
            raise WeightsError(
                f"{file} is a program, and torch.export.load runs whatever is in one; give the export's folder or "
                "its model.safetensors, which hold the same network, or predict with its model.onnx"
            )
        weights = read_weights(path)
        beside = file.with_name(RUN_WEIGHTS)
        if part or file.suffix != ".ckpt" or not beside.is_file():
            return weights
        known = read_weights(beside).metadata  # a checkpoint of a run knows less than what the run has exported
        return replace(weights, metadata=known | weights.metadata)
    if (file / RUN_WEIGHTS).is_file():
        return read_weights(file / RUN_WEIGHTS)
    if (file / HUB_WEIGHTS).is_file():
        weights = read_weights(file / HUB_WEIGHTS)
        if "name" in weights.metadata or not (file / HUB_CONFIG).is_file():
            return weights
        return replace(weights, metadata=_metadata_of_hub(file / HUB_CONFIG))
    raise FileNotFoundError(
        f"{file} holds neither {RUN_WEIGHTS}, as the folder of a finished run does, nor {HUB_WEIGHTS}, as an export "
        "does"
    )


def _metadata_of_hub(path: Path) -> dict[str, str]:
    """What timm's ``config.json`` says, by the names of :class:`WeightsFacts`; its values are checked as theirs."""
    try:
        if path.stat().st_size > _MOST_CONFIG:
            raise ValueError(f"more than {_MOST_CONFIG:,} bytes")
        config = json.loads(path.read_bytes())
        own = config.get("pretrained_cfg") or {}
        said = {**own, **{key: value for key, value in config.items() if value is not None}}
        crop, shape = said.get("crop_pct"), said.get("input_size")
        found = {
            "num_classes": said.get("num_classes"),
            "class_names": said.get("label_names"),
            "image_shape": shape,
            "mean": said.get("mean"),
            "std": said.get("std"),
            "resize": int(shape[-1] / crop) if crop and shape else None,
        }
        names = {"name": f"timm/{said['architecture']}", "interpolation": said.get("interpolation")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} is not the configuration of an image classifier ({error!r})") from error
    texts = {key: json.dumps(value) for key, value in found.items() if value is not None}
    return texts | {key: value for key, value in names.items() if isinstance(value, str)}


def _width(weights: Weights) -> int:
    """How many classes the last layer of a network tells apart, by its bias or weight."""
    last = [
        value for key, value in weights.state_dict.items() if value.ndim in (1, 2) and key.endswith(("bias", "weight"))
    ]
    if not last or last[-1].shape[0] < 2:
        raise WeightsError(f"{weights.source} does not say how many classes it knows; give class_names")
    return last[-1].shape[0]
