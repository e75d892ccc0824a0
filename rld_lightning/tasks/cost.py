"""Measures what networks cost: parameters, multiply-accumulates, and the time for one image on this machine."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from rld_lightning.models.complexity import count_macs, count_parameters, images_per_second
from rld_lightning.models.factory import create_model
from rld_lightning.models.weights.facts import read_facts
from rld_lightning.models.weights.read import read_metadata
from rld_lightning.reporting.cost import Cost, known_cost
from rld_lightning.runs.files import STUDENT
from rld_lightning.runs.finished import Run
from rld_lightning.runs.provenance import processor_name
from rld_lightning.tasks.teacher.recorded import seen_as_teacher

# What is believed of a folder that may be a stranger's: a network is built, and run, for so many.
_MOST_CLASSES, _LARGEST_SIDE = 100_000, 1024


def measure_cost(name: str, runs: Sequence[Run], *, latency: bool = True) -> Cost | None:
    """The cost of a network by name.

    Args:
        name: as in ``model.student.name``.
        runs: some of its data set; they know the size of the images, and what the network costs if they trained it.
        latency: whether to measure its time, about half a second, with fresh weights on the CPU.

    Returns:
        None where the network cannot be built, as one that is not in this package any more.
    """
    known = known_cost(name, runs)
    if known is not None and not latency:
        return known
    num_classes, image_shape = _images(runs)
    seen = seen_as_teacher(name, runs, image_shape)
    image_shape = seen if max(seen) <= _LARGEST_SIDE else image_shape
    try:
        network = create_model(name, num_classes)
    except (ValueError, ImportError):
        return known
    cost = known or Cost(count_parameters(network), count_macs(network, image_shape))
    speed = images_per_second(network, image_shape, batch_size=1, seconds=0.5) if latency else None
    return replace(cost, milliseconds=1000 / speed, machine=_this_machine()) if speed else cost


def _this_machine() -> str:
    """The processor that latency is measured on, and with how many threads."""
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}, float32"


def _images(runs: Sequence[Run]) -> tuple[int, tuple[int, int, int]]:
    """Number of classes and shape of the images, from an exported student; else what the configuration says."""
    for run in runs:
        weights = run.folder / STUDENT
        try:
            facts = read_facts(read_metadata(weights) if weights.is_file() else {}, weights)
        except (ValueError, OSError):  # left in part, or of another kind
            continue
        classes, shape = facts.num_classes, facts.image_shape
        if classes is not None and shape is not None and classes <= _MOST_CLASSES and max(shape) <= _LARGEST_SIDE:
            return classes, shape
    size = runs[0].config["data"].get("image_size")
    size = size if type(size) is int and 0 < size <= _LARGEST_SIDE else 32
    return 100, (3, size, size)
