"""What networks cost: parameters, multiply-accumulates, and the time for one image on this machine."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rld_lightning.models.complexity import count_macs, count_parameters, images_per_second
from rld_lightning.models.factory import create_model
from rld_lightning.models.read import WeightsError, read_metadata
from rld_lightning.runs.finished import Run
from rld_lightning.runs.provenance import processor_name


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Args:
        parameters: number of weights.
        macs: multiply-accumulates for one image.
        milliseconds: for one image at a time; None where it was not measured.
    """

    parameters: int
    macs: int
    milliseconds: float | None = None


def network_cost(name: str, runs: Sequence[Run], *, latency: bool) -> Cost | None:
    """The cost of a network by name.

    Args:
        name: as in ``model.student.name``.
        runs: some of its data set; they know the size of the images, and what the network costs if they trained it.
        latency: whether to measure its time, about half a second, with fresh weights on the CPU.

    Returns:
        None where the network cannot be built, as one that is not in this package any more.
    """
    known = next((run.summary for run in runs if run.summary.model == name), None)
    if known is not None and not latency:
        return Cost(known.parameters, known.macs)
    num_classes, image_shape = _images(runs)
    try:
        network = create_model(name, num_classes)
    except (ValueError, ImportError):
        return Cost(known.parameters, known.macs) if known else None
    parameters, macs = known.parameters if known else count_parameters(network), None
    macs = known.macs if known else count_macs(network, image_shape)
    speed = images_per_second(network, image_shape, batch_size=1, seconds=0.5) if latency else None
    return Cost(parameters, macs, 1000 / speed if speed else None)


def this_machine() -> str:
    """The processor that latency is measured on, and with how many threads."""
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}, float32"


def _images(runs: Sequence[Run]) -> tuple[int, tuple[int, int, int]]:
    """Number of classes and shape of the images, from an exported student; else what the configuration says."""
    for run in runs:
        weights = run.folder / "student.safetensors"
        try:
            facts = read_metadata(weights)
        except (WeightsError, OSError):  # moved away, or left in part
            continue
        if "num_classes" in facts and "image_shape" in facts:
            return int(facts["num_classes"]), tuple(json.loads(facts["image_shape"]))
    size = runs[0].config["data"].get("image_size", 32)
    return 100, (3, size, size)
